"""Every built-in backbone says of its model, weights and pixels what the upstream libraries say."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import skimage.data
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torchvision import models, transforms

from saebench import paths
from saebench.backbones.activations import activations_of, check_activations
from saebench.backbones.checks import check_entry
from saebench.backbones.describe import site_specs
from saebench.backbones.overview import CORPORA, PRETRAININGS, backbones_table, terms_table
from saebench.backbones.pixels import Transform
from saebench.errors import SpecError
from saebench.scaffold.upstream import default_site
from saebench.specs import InputSpec, semantic_fields
from tests.backbone_cases import CASES, load
from tests.registry_models import ENTRIES, OF_A_HUB, UPSTREAM, model_of, shapes_only, upstream

NAMES = list(UPSTREAM)
ALL = pytest.mark.parametrize("name", NAMES)
LARGE = ("siglip-so400m-patch14-384", *(name for name in NAMES if re.search("vit-?l1[46]", name)))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_these_are_all_of_them() -> None:
    assert set(UPSTREAM) == set(ENTRIES)


@ALL
def test_an_entry_is_complete(name: str) -> None:
    spec = ENTRIES[name]
    texts = (spec.family, spec.architecture, spec.description, spec.licence, spec.activation)
    assert all(texts), texts
    assert spec.paper.startswith("https://arxiv.org/abs/") or name == "resnet50-tv-v2"
    assert set(spec.pretraining.split(", then ")) <= set(PRETRAININGS)
    assert set(spec.corpus.split(", then ")) <= set(CORPORA)
    assert spec.dataset == ("inat21" if name.startswith("bioclip") else "imagenet-1k")
    assert spec.site == default_site(spec.sites)
    assert "--from " + UPSTREAM[name].replace("quickgelu_", "") in Path(spec.path).read_text()


@ALL
def test_weights_are_where_the_library_has_them(name: str) -> None:
    library, what = upstream(name)
    weights = ENTRIES[name].weights
    if library == "timm":
        hub = timm.get_pretrained_cfg(what).hf_hub_id
    elif library == "open_clip":
        hub = open_clip.get_pretrained_cfg(*what.split("/"))["hf_hub"].strip("/")
    else:
        hub = what
    assert weights.hub == hub
    # What is pinned is a whole commit and a whole hash, of a file that is named.
    assert weights.revision is None or re.fullmatch(r"[0-9a-f]{40}", weights.revision)
    if weights.sha256 is not None:
        assert re.fullmatch(r"[0-9a-f]{64}", weights.sha256)
        assert weights.filename


# Pixels.


def _torchvision(resize: int, crop: int) -> Any:
    """The evaluation pipeline of the repositories of DINO, DINOv2, DeiT and MAE."""
    return transforms.Compose(
        [
            transforms.Resize(resize, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET),
        ]
    )


# Where the weights' own pipeline is not timm's default: theirs, and timm's with its numbers.
_OWN = {
    **{name: (_torchvision(256, 224), 224 / 256) for name in NAMES if name.startswith("dinov2-")},
    **dict.fromkeys(
        ("dino-vitb16", "mae-vitb16", "deit-b16", "deit-b16-distilled"),
        (_torchvision(256, 224), 224 / 256),
    ),
    "resnet50-tv-v1": (models.ResNet50_Weights.IMAGENET1K_V1.transforms(), None),
    "resnet50-tv-v2": (models.ResNet50_Weights.IMAGENET1K_V2.transforms(), 224 / 232),
}
# A fine-tune's base sees the fine-tune's pixels.
_PAIRED = {"resnetv2-50x1-bit-in21k": "resnetv2-50x1-bit-in21k-ft-in1k"}


def upstream_transforms(name: str) -> list[Any]:
    library, what = upstream(_PAIRED.get(name, name))
    if library == "timm":
        config = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(what).to_dict())
        if name in _OWN:
            own, crop_pct = _OWN[name]
            if crop_pct is not None:
                config |= {"input_size": (3, 224, 224), "crop_pct": crop_pct}
            return [own, create_transform(**config)]
        return [create_transform(**config)]
    if library == "open_clip":
        model, tag = what.split("/")
        known = set(asdict(PreprocessCfg()))
        config = {k: v for k, v in open_clip.get_pretrained_cfg(model, tag).items() if k in known}
    else:  # BioCLIP's own configuration says CLIP's pixels, which are open_clip's default
        model, config = OF_A_HUB[name], {}
    size = open_clip.get_model_config(model)["vision_cfg"]["image_size"]
    return [image_transform_v2(PreprocessCfg(size=size, **config), is_train=False)]


@cache
def photographs() -> tuple[Image.Image, ...]:
    """Landscape, portrait, square and a strip: of scikit-learn and scikit-image."""
    china, flower = load_sample_images().images
    arrays = [china, flower, skimage.data.astronaut(), skimage.data.rocket()]
    images = [Image.fromarray(array) for array in arrays]
    return (*images, images[0].rotate(90, expand=True), images[3].crop((100, 0, 240, 400)))


@ALL
def test_pixels_are_the_weights_own(name: str) -> None:
    ours = Transform(ENTRIES[name].input)
    for theirs in upstream_transforms(name):
        for photo in photographs():
            assert torch.equal(ours(photo), theirs(photo)), photo.size


def test_two_entries_that_differ_in_their_resize_alone(tmp_path: Path) -> None:
    spec = ENTRIES["siglip-vit-b16"]
    other = replace(spec, input=replace(spec.input, resize="shortest", crop=True))
    hashes = [json.dumps(semantic_fields(one), sort_keys=True) for one in (spec, other)]
    assert hashes[0] != hashes[1]
    photo = photographs()[0]
    assert photo.width != photo.height
    pixels = [Transform(one.input)(photo) for one in (spec, other)]
    assert pixels[0].shape == pixels[1].shape
    assert not torch.allclose(pixels[0], pixels[1], atol=0.1)

    squash = InputSpec(size=32, resize="squash", crop=False)
    backbones = [load(CASES["vit"], tmp_path, input=i) for i in (squash, InputSpec(size=32))]
    captures = [b.acts(b.transform(photo)[None], ["blocks.2"])["blocks.2"] for b in backbones]
    assert not torch.allclose(captures[0].acts_btd, captures[1].acts_btd, atol=0.01)


# Models.


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in NAMES]
)
def test_sites_head_and_activation_are_the_models(name: str, tmp_path: Path) -> None:
    spec = ENTRIES[name]
    model = model_of(spec, tmp_path, values=False)
    check_entry(spec, model)
    check_activations(spec, model)
    with shapes_only():
        natural = site_specs(model, spec.input.size)
    assert {name: spec.sites[name] for name in natural} == natural
    # Others are what published SAEs were trained on, of blocks that are sites themselves.
    for added in spec.sites.keys() - natural.keys():
        block, site = natural[added.rpartition(".")[0]], spec.sites[added]
        assert site.path.startswith(f"{block.path}.")
        assert replace(site, path=block.path, kind="bottleneck") == block
    library, what = upstream(name)
    if library == "timm" and spec.head.kind != "none":
        assert model.n_classes == timm.get_pretrained_cfg(what).num_classes
    if library != "timm":
        # The text tower, which no site shows, runs the activation of its weights as well.
        quick = library == "open_clip" and open_clip.get_pretrained_cfg(*what.split("/")).get(
            "quick_gelu", False
        )
        assert ("quick_gelu" in activations_of(model.module)) == quick
        assert not (quick and "gelu" in activations_of(model.module))


def test_tokens_are_as_published() -> None:
    """Counts from the papers: registers after CLS, none in SigLIP, two prefix tokens in DeiT."""
    expected = {
        "clip-vit-b32-openai": {"cls": (0, 1), "patches": (1, 50)},
        "clip-vit-l14-336-openai": {"cls": (0, 1), "patches": (1, 577)},
        "siglip-vit-b16": {"patches": (0, 196)},
        "siglip-so400m-patch14-384": {"patches": (0, 729)},
        "dinov2-vitb14": {"cls": (0, 1), "patches": (1, 257)},
        "dinov2-vitb14-reg": {"cls": (0, 1), "registers": (1, 5), "patches": (5, 261)},
        "dinov3-vitb16": {"cls": (0, 1), "registers": (1, 5), "patches": (5, 261)},
        "deit-b16": {"cls": (0, 1), "patches": (1, 197)},
        "deit-b16-distilled": {"cls": (0, 1), "distillation": (1, 2), "patches": (2, 198)},
        "resnet50-a1": {"grid": (0, 196)},
    }
    for name, kinds in expected.items():
        spec = ENTRIES[name]
        found = {k: (s.start, s.stop) for k, s in spec.sites[spec.site].kinds.items()}
        assert found == kinds, name


def test_patches_of_a_model_without_registers_are_all_of_its_patches(tmp_path: Path) -> None:
    spec = ENTRIES["dinov2-vits14"]
    model = model_of(spec, tmp_path, values=False)
    ranks = np.arange(257)
    assert len(ranks[spec.sites["blocks.10"].kinds["patches"]]) == 256
    # 4 registers and 252 patches are as many tokens, and are refused.
    wrong = replace(spec.sites["blocks.10"], registers=4, grid=(14, 18))
    with pytest.raises(SpecError, match=r"4 registers \+ 252 patches"):
        check_entry(replace(spec, sites={"blocks.10": wrong}), model)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("clip-vit-b32-openai", "ViT-B-32"),
        ("vit-b16-clip-openai", "vit_base_patch16_clip_224"),
        ("clip-vit-b32-laion2b", "ViT-B-32-quickgelu"),
    ],
)
def test_the_name_with_the_wrong_gelu_is_refused(name: str, model: str, tmp_path: Path) -> None:
    wrong = replace(ENTRIES[name], model=model)
    built = model_of(wrong, tmp_path, values=False)
    with pytest.raises(SpecError, match=r"is built with (quick_)?gelu"):
        check_activations(wrong, built)


BASES = [(name, spec.base) for name, spec in ENTRIES.items() if spec.base]


def test_the_pairs_of_the_literature_are_there() -> None:
    assert dict(BASES) == {
        "bioclip": "clip-vit-b16-openai",
        "bioclip-2": "clip-vit-l14-laion2b",
        "vit-b16-augreg-in21k-ft-in1k": "vit-b16-augreg-in21k",
        "vit-b16-clip-openai-ft-in1k": "vit-b16-clip-openai",
        "resnetv2-50x1-bit-in21k-ft-in1k": "resnetv2-50x1-bit-in21k",
    }


@pytest.mark.parametrize(("name", "base"), BASES)
def test_a_fine_tune_and_its_base_share_sites_and_pixels(name: str, base: str) -> None:
    spec, other = ENTRIES[name], ENTRIES[base]
    assert spec.sites == other.sites
    assert spec.site == other.site
    same = replace(other.input, mean=spec.input.mean, std=spec.input.std)
    assert spec.input == (same if name == "bioclip-2" else other.input)
    assert spec.corpus.startswith(other.corpus)


def test_classes_of_imagenet_are_the_outputs_of_its_classifiers() -> None:
    for name, spec in ENTRIES.items():
        of_imagenet = name.endswith("in1k") or spec.corpus == "imagenet-1k"
        classifier = of_imagenet and spec.pretraining.endswith("supervised")
        assert dict(spec.head.classes) == ({"imagenet-1k": (0, 1000)} if classifier else {}), name
        assert not spec.head.templates, "templates are the dataset's"


def test_the_page_has_the_tables_of_the_entries() -> None:
    page = (paths.CONTENT / "docs/backbones.md").read_text()
    tables = {"backbones": backbones_table(ENTRIES.values()), "terms": terms_table()}
    for name, table in tables.items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in page, (
            f"write it anew: saebench.backbones.overview.{name}_table"
        )
