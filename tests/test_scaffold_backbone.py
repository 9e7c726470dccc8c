"""`saebench new backbone --from`: it writes what the libraries say, and that passes the check."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save, save_file

from saebench.backbones import load_backbone
from saebench.cli import parse
from saebench.errors import SpecError, UsageError, WeightsError
from saebench.registry import Registry
from saebench.scaffold import write_new
from saebench.scaffold.known import architecture, known
from saebench.scaffold.upstream import described
from saebench.specs import BackboneSpec
from saebench.testing import check_backbone
from tests.backbone_cases import clip_config, randomise
from tests.hub_stand_in import HubStandIn, hub  # noqa: F401 (a fixture)
from tests.registry_models import ENTRIES, UPSTREAM

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


def new(out: Path, name: str, source: str, **options: Any) -> BackboneSpec:
    registry = Registry.load([out] if out.is_dir() else [])
    write_new(registry, "backbone", name, out=str(out), source=source, **options)
    return Registry.load([out]).backbone(name)


def said(spec: BackboneSpec) -> dict[str, Any]:
    fields = asdict(spec)
    for own in ("name", "path", "description", "licence", "base"):
        fields.pop(own)
    for published in ("features", "linear", "interleaved"):  # the weights' repository has no heads
        fields["head"].pop(published)
    return fields | {"weights": spec.weights.hub}


def test_the_command_line_calls_it_from() -> None:
    command: Any = parse(["new", "backbone", "x", "--from", "timm:y", "--loader", "timm"])
    assert (command.from_, command.loader) == ("timm:y", "timm")


@pytest.mark.parametrize(
    "name",
    [
        "dinov2-vits14",
        "clip-vit-b32-openai",
        "clip-rn50-openai",
        "resnet50-a1",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("deit-b16-distilled", "siglip-vit-b16", "siglip2-vit-b16")
        ),
    ],
)
def test_what_is_written_is_the_built_in_entry(name: str, tmp_path: Path) -> None:
    """Written, and read again: so the text says all that was found."""
    spec = new(tmp_path, "mine", UPSTREAM[name])
    assert said(spec) == said(ENTRIES[name])
    assert spec.licence == ENTRIES[name].licence


def test_quick_gelu_weights_get_a_quick_gelu_model(tmp_path: Path) -> None:
    spec, notes = described("timm:vit_base_patch16_clip_224.openai", "x", tmp_path / "x.toml")
    assert "QuickGELU" in notes[""]
    assert (spec.model, spec.activation) == ("vit_base_patch16_clip_quickgelu_224", "quick_gelu")
    assert spec.head.kind == "none", "its 512 outputs are CLIP's projection, not classes"


def test_quick_gelu_is_forced_where_open_clip_has_no_name_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip, "list_models", lambda: ["ViT-B-32"])
    spec, _ = described("open_clip:ViT-B-32/openai", "x", tmp_path / "x.toml")
    assert (spec.model, spec.model_args) == ("ViT-B-32", {"force_quick_gelu": True})
    assert spec.activation == "quick_gelu"


def test_pixels_that_are_not_timms_default_say_so(tmp_path: Path) -> None:
    new(tmp_path, "mine", "timm:resnet50.tv2_in1k")
    text = (tmp_path / "registry/backbones/mine.toml").read_text()
    assert "# The makers' own; timm's default is shortest 201, 176 pixels.\n[input]" in text


def test_a_fine_tune_of_ones_own(tmp_path: Path) -> None:
    """The number of classes is read from the file; the pixels are those of the name's weights."""
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    module = randomise(timm.create_model(name, num_classes=7))
    save_file(module.state_dict(), tmp_path / "mine.safetensors")
    spec = new(tmp_path, "mine", f"timm:{name}", weights=str(tmp_path / "mine.safetensors"))
    assert spec.model_args == {"num_classes": 7}
    assert spec.weights.hub is None
    assert spec.head.kind == "classifier"
    assert spec.head.classes == {}, "which dataset's they are only their maker knows"
    images = torch.randn(2, 3, 224, 224)
    logits = load_backbone(spec).forward(images).logits_bc
    with torch.inference_mode():
        assert logits is not None
        assert torch.equal(logits, module.eval()(images))


def test_a_checkpoint_without_a_head(tmp_path: Path) -> None:
    module = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(module.state_dict(), tmp_path / "mine.safetensors")
    spec = new(
        tmp_path, "mine", "timm:vit_tiny_patch16_224", weights=str(tmp_path / "mine.safetensors")
    )
    assert spec.model_args == {"num_classes": 0}
    assert spec.head.kind == "none"


# Repositories of a hub.


def timm_repository(n_classes: int = 7) -> dict[str, bytes]:
    module = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=n_classes, **SMALL))
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": n_classes,
        "model_args": SMALL,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 0.8,
            "crop_mode": "center",
            "mean": [0.4, 0.5, 0.6],
            "std": [0.1, 0.2, 0.3],
            "num_classes": n_classes,
            "classifier": "head",
        },
    }
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(module.state_dict()),
    }


def open_clip_repository(folder: Path) -> dict[str, bytes]:
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    config = {"model_cfg": clip_config(), "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    module = randomise(open_clip.create_model(f"local-dir:{folder}", load_weights=False))
    return {
        "open_clip_config.json": json.dumps(config).encode(),
        "open_clip_model.safetensors": save(module.state_dict()),
    }


def test_a_repository_in_timms_form(tmp_path: Path, hub: HubStandIn) -> None:  # noqa: F811
    hub.commit("me/mine", timm_repository())
    spec = new(tmp_path, "mine", "hf-hub:me/mine")
    assert (spec.loader, spec.model, spec.model_args) == ("timm", "hf-hub:me/mine", {})
    assert (spec.input.resize_to, spec.input.interpolation) == (40, "bilinear")
    assert spec.input.mean == (0.4, 0.5, 0.6)
    assert spec.head.kind == "classifier"
    assert {"blocks.0", "blocks.2", "norm", "pooled"} <= set(spec.sites)
    checks = list(check_backbone(Registry.load([tmp_path]), "mine"))
    assert all(check.passed for check in checks), checks


def test_the_weights_of_a_repository_need_no_table(
    tmp_path: Path,
    hub: HubStandIn,  # noqa: F811
) -> None:
    hub.commit("me/mine", timm_repository())
    spec = new(tmp_path, "mine", "hf-hub:me/mine")
    path = Path(spec.path)
    path.write_text(path.read_text().replace('hub = "me/mine"', ""))
    registry = Registry.load([tmp_path])
    assert registry.backbone("mine").weights.hub is None
    built = next(iter(check_backbone(registry, "mine")))
    assert built.passed
    assert built.detail.endswith("parameters, activation gelu"), "not: RANDOM"


def test_a_check_says_what_was_resampled(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    module = timm.create_model(name, **SMALL | {"img_size": 48}, num_classes=0)
    save_file(module.state_dict(), tmp_path / "mine.safetensors")
    (tmp_path / "registry/backbones").mkdir(parents=True)
    (tmp_path / "registry/backbones/mine.toml").write_text(f"""\
loader = "timm"
model = "{name}"
weights = {{ file = "../../mine.safetensors" }}
input = {{ size = 32 }}
sites = {{ norm = {{ path = "norm", width = 24, cls = 1, grid = [4, 4] }} }}
[model_args]
num_classes = 0
img_size = 32
patch_size = 8
embed_dim = 24
depth = 3
num_heads = 2
""")
    built = next(iter(check_backbone(Registry.load([tmp_path]), "mine")))
    assert built.passed
    assert built.detail.endswith(
        "activation gelu (not declared), position embedding resampled from 6 x 6 to 4 x 4"
    )


def test_a_repository_in_open_clips_form(tmp_path: Path, hub: HubStandIn) -> None:  # noqa: F811
    hub.commit("me/mine", open_clip_repository(tmp_path))
    spec = new(tmp_path, "mine", "hf-hub:me/mine")
    assert (spec.loader, spec.model) == ("open_clip", "hf-hub:me/mine")
    assert (spec.input.resize, spec.input.size, spec.input.crop) == ("squash", 32, False)
    assert spec.head.kind == "zero_shot"
    checks = list(check_backbone(Registry.load([tmp_path]), "mine"))
    assert all(check.passed for check in checks), checks


def test_a_repository_of_both_forms_and_a_revision(
    tmp_path: Path,
    hub: HubStandIn,  # noqa: F811
) -> None:
    first = hub.commit("me/mine", timm_repository() | open_clip_repository(tmp_path))
    hub.commit("me/mine", timm_repository(9))
    source = f"hf-hub:me/mine@{first}"
    assert new(tmp_path / "a", "mine", source).loader == "open_clip"
    spec = new(tmp_path / "b", "mine", source, loader="timm")
    assert (spec.loader, spec.weights.revision) == ("timm", first)
    assert load_backbone(spec).model.n_classes == 7


def test_a_repository_of_another_library(tmp_path: Path, hub: HubStandIn) -> None:  # noqa: F811
    hub.commit("me/mine", {"config.json": b'{"model_type": "vit"}'})
    with pytest.raises(SpecError, match="a loader of your own"):
        new(tmp_path, "mine", "hf-hub:me/mine")
    with pytest.raises(WeightsError, match="me/absent"):
        new(tmp_path, "mine", "hf-hub:me/absent")


# What cannot be.


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("vit_base_patch16_224", {}, "is no model"),
        ("timm:", {}, "is no model"),
        ("hf-hub:mine", {}, "is no model"),
        ("timm:vit_bas_patch16_224", {}, "the nearest: vit_base_patch16_224"),
        ("timm:vit_base_patch16_224.augreg_in22k", {}, "augreg_in21k"),
        ("open_clip:ViT-B_16/openai", {}, "ViT-B-16"),
        ("open_clip:ViT-B-16", {}, "the tags: openai"),
        ("open_clip:ViT-B-16/laion", {}, "the tags: openai"),
        ("timm:nope", {}, "timm.list_models() has all names"),
        ("open_clip:0123456789/openai", {}, "open_clip.list_models() has all names"),
        ("timm:gcvit_tiny.in1k", {}, "--weights FILE"),
        ("timm:resnet50", {"loader": "timm"}, "leave it out"),
    ],
)
def test_sources_that_are_none(
    source: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        new(tmp_path, "mine", source, **options)
    assert message in str(error.value)
    assert not list(tmp_path.rglob("*.toml"))


def test_only_a_backbone_comes_from_somewhere(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not of a task"):
        write_new(Registry.load(), "task", "x", out=str(tmp_path), source="timm:resnet50")


def test_pixels_that_an_entry_cannot_say(tmp_path: Path) -> None:
    from saebench.scaffold.pixels import open_clip_pixels

    model = {"vision_cfg": {"image_size": 224}}
    assert open_clip_pixels(model, {}, "x").resize == "shortest"
    with pytest.raises(SpecError, match="by hand"):
        open_clip_pixels(model, {"resize_mode": "longest"}, "x")
    with pytest.raises(SpecError, match="by hand"):
        open_clip_pixels({"vision_cfg": {"image_size": (224, 448)}}, {}, "x")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("vit_base_patch16_224.augreg_in21k", "ViT-B/16"),
        ("vit_small_patch14_reg4_dinov2.lvd142m", "ViT-S/14 with 4 registers"),
        ("deit_base_distilled_patch16_224.fb_in1k", "ViT-B/16 with a distillation token"),
        ("vit_so400m_patch14_siglip_384.webli", "ViT-SO400M/14"),
        ("ViT-L-14-336-quickgelu", "ViT-L/14"),
        ("RN50-quickgelu", "ResNet-50 with attention pooling"),
        ("resnetv2_50x1_bit.goog_in21k", "ResNetV2-50x1"),
        ("mobilenetv2_100.ra_in1k", ""),
    ],
)
def test_architectures_as_a_reader_knows_them(name: str, shown: str) -> None:
    assert architecture(name) == shown


def test_what_a_name_says() -> None:
    tuned = known("vit_base_patch16_clip_224.laion2b_ft_in12k_in1k")
    assert tuned.corpus.startswith("laion-2b, then imagenet-12k")
    assert tuned.pretraining == "contrastive, then supervised"
    assert known("mobilenetv2_100.ra_in1k").corpus == "imagenet-1k"
    assert known("me/mine") == replace(known(""), family="")
