"""The embedded backbones are as good as docs/embedded.md says, loaded through timm and open_clip.

Nothing here uses `saebench.backbones`: upstream's own loaders and forward passes are the judge.
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from saebench.backbones import load_backbone
from saebench.data import Dataset, open_dataset
from saebench.paths import CONTENT
from saebench.specs import BackboneSpec, DatasetSpec
from saebench.strict import read_spec

NAMES = ("tiny-clip", "tiny-bioclip", "tiny-dinov2", "tiny-vit", "tiny-resnet")
CLASSIFIERS = ("tiny-vit", "tiny-resnet")


@cache
def spec_of(name: str) -> BackboneSpec:
    return read_spec(BackboneSpec, CONTENT / f"registry/backbones/{name}.toml", name)


@cache
def dataset(name: str) -> Dataset:
    path = CONTENT / f"registry/datasets/{name}.toml"
    return open_dataset(read_spec(DatasetSpec, path, name))


@cache
def images(name: str, split: str, limit: int | None = None) -> tuple[torch.Tensor, np.ndarray]:
    """(images [n 3 32 32], labels [n]) in evaluation order."""
    data = dataset(name)
    rows = data.manifest(split).order(limit)
    pixels = np.stack([np.asarray(data.image(split, int(i))) for i in rows])
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    return tensor, data.manifest(split).labels[rows]


def weights(spec: BackboneSpec) -> Path:
    assert spec.weights.file
    return Path(spec.path).parent / spec.weights.file


def clip_folder(spec: BackboneSpec) -> Path:
    return (Path(spec.path).parent / spec.model.removeprefix("local-dir:")).resolve()


@cache
def model_of(name: str, trained: bool) -> torch.nn.Module:
    spec = spec_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if spec.loader == "open_clip":
            logging.disable(logging.WARNING)  # open_clip warns that it loads no weights
            model = open_clip.create_model(f"local-dir:{clip_folder(spec)}", load_weights=False)
            logging.disable(logging.NOTSET)
        else:
            model = timm.create_model(spec.model, pretrained=False, **spec.model_args)
    if trained:
        model.load_state_dict(load_file(weights(spec)))
    return model.eval()


@torch.inference_mode()
def features(name: str, batch: torch.Tensor, trained: bool = True) -> np.ndarray:
    model = model_of(name, trained=trained)
    if isinstance(model, open_clip.CLIP):
        found = [model.encode_image(part) for part in batch.split(256)]
    else:
        found = [
            model.forward_head(model.forward_features(part), pre_logits=True)  # type: ignore[operator]
            for part in batch.split(256)
        ]
    return torch.cat(found).numpy()


def probe(name: str, data: str, trained: bool = True, limit: int | None = None) -> float:
    train, train_labels = images(data, "train", limit)
    test, test_labels = images(data, "test")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(features(name, train, trained), train_labels)
    return float(classifier.score(features(name, test, trained), test_labels))


@torch.inference_mode()
def zero_shot(name: str, data: str, limit: int | None = None) -> float:
    spec, model = spec_of(name), model_of(name, trained=True)
    assert isinstance(model, open_clip.CLIP)
    folder = clip_folder(spec)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    merges = config["text_cfg"]["tokenizer_kwargs"]["bpe_path"]
    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=str(folder / merges))
    assert tokenizer.vocab_size == config["text_cfg"]["vocab_size"] == model.vocab_size
    classes = []
    for class_name in dataset(data).class_names:
        texts = [template.format(class_name) for template in spec.head.templates[data]]
        embedding = model.encode_text(tokenizer(texts), normalize=True).mean(0)
        classes.append(embedding / embedding.norm())
    test, labels = images(data, "test", limit)
    embeddings = model.encode_image(test, normalize=True)
    return float(((embeddings @ torch.stack(classes).T).argmax(1).numpy() == labels).mean())


@pytest.mark.parametrize("name", NAMES)
def test_entry_and_weights_agree(name: str):
    spec = spec_of(name)
    path = weights(spec)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == spec.weights.sha256
    state = load_file(path)
    floats = [value for value in state.values() if value.is_floating_point()]
    assert all(value.dtype == torch.float16 and value.isfinite().all() for value in floats)
    assert sum(value.numel() for value in floats) < 300_000


def test_all_weights_are_small():
    assert sum(weights(spec_of(name)).stat().st_size for name in NAMES) < 2.4e6


@pytest.mark.parametrize("name", NAMES)
def test_sites_have_the_declared_layout(name: str):
    spec, model = spec_of(name), model_of(name, trained=True)
    assert spec.site in spec.sites
    modules, seen, handles = dict(model.named_modules()), {}, []
    for site, where in spec.sites.items():

        def record(_module, _inputs, output, site=site):
            seen[site] = output

        handles.append(modules[where.path].register_forward_hook(record))
    batch = images("shapes", "test", 3)[0]
    features(name, batch)
    for handle in handles:
        handle.remove()
    for site, where in spec.sites.items():
        shape = tuple(seen[site].shape)
        if where.layout == "map":
            assert where.grid
            assert shape == (3, where.width, *where.grid)
        else:
            assert shape == (3, where.tokens, where.width)


@pytest.mark.parametrize("name", NAMES)
def test_saebench_loads_the_same_model(name: str):
    """The embedding through `load_backbone`, transform included, is upstream's own."""
    backbone = load_backbone(spec_of(name))
    data, rows = dataset("shapes"), dataset("shapes").manifest("test").order(4)
    batch = torch.stack([backbone.transform(data.image("test", int(i))) for i in rows])
    np.testing.assert_allclose(batch, images("shapes", "test", 4)[0], atol=1e-6)
    ours = backbone.forward(batch).embedding_bd.numpy()
    theirs = features(name, batch)
    if spec_of(name).loader == "open_clip":  # compared as directions, which is all CLIP uses
        ours, theirs = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize(("data", "least"), [("digits", 0.97), ("shapes", 0.4)])
def test_heads_classify(name: str, data: str, least: float):
    test, labels = images(data, "test")
    first, count = spec_of(name).head.classes[data]
    assert count == len(dataset(data).class_names)
    with torch.inference_mode():
        chosen = model_of(name, trained=True)(test)[:, first : first + count].argmax(1).numpy()
    assert (chosen == labels).mean() > least


def test_clip_reads_digits_zero_shot():
    assert zero_shot("tiny-clip", "digits") > 0.95


def test_fine_tuning_on_the_taxonomy_tells_species_better():
    base, tuned = (zero_shot(n, "shapes", limit=480) for n in ("tiny-clip", "tiny-bioclip"))
    assert tuned > base > 1 / 48
    assert spec_of("tiny-bioclip").base == "tiny-clip"
    state, base_state = (load_file(weights(spec_of(n))) for n in ("tiny-bioclip", "tiny-clip"))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in base_state.items()}


def test_self_distilled_features_separate_digits():
    assert probe("tiny-dinov2", "digits") > 0.95


def test_a_probe_on_species_beats_random_weights():
    trained, random = (probe("tiny-resnet", "shapes", t, limit=1200) for t in (True, False))
    assert trained > random + 0.08


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "tiny-resnet"])
def test_every_probe_on_species_beats_random_weights(name: str):
    trained, random = (probe(name, "shapes", trained) for trained in (True, False))
    assert trained > random + 0.08


@pytest.mark.slow
def test_a_recipe_reaches_the_stored_accuracy_again(tmp_path: Path):
    from recipes.backbones.__main__ import make

    path, _ = make("tiny-resnet", tmp_path)
    spec = spec_of("tiny-resnet")
    again = timm.create_model(spec.model, pretrained=False, **spec.model_args)
    again.load_state_dict(load_file(path))
    again.eval()
    for data, margin in (("digits", 0.015), ("shapes", 0.05)):
        test, labels = images(data, "test")
        first, count = spec.head.classes[data]
        with torch.inference_mode():
            ours, stored = (
                (model(test)[:, first : first + count].argmax(1).numpy() == labels).mean()
                for model in (again, model_of("tiny-resnet", trained=True))
            )
        assert ours > stored - margin
    with torch.inference_mode():
        test, labels = images("digits", "test")
        assert (again(test)[:, :10].argmax(1).numpy() == labels).mean() > 0.97


def test_images_are_what_the_entries_say():
    """All embedded entries take 32x32 images as they are, scaled to -1..1."""
    for name in NAMES:
        pixels = spec_of(name).input
        assert (pixels.size, pixels.resize, pixels.crop) == (32, "squash", False)
        assert pixels.mean == pixels.std == (0.5, 0.5, 0.5)
    image = Image.fromarray(np.full((32, 32, 3), 255, np.uint8))
    assert image.resize((32, 32), Image.Resampling.BICUBIC).tobytes() == image.tobytes()
