"""Text classifiers against open_clip's own, their keys, and what a model does with them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from saebench import text_embeddings, zero_shot
from saebench.backbones import Backbone, load_backbone
from saebench.backbones.steps import Output
from saebench.data import Dataset, open_dataset
from saebench.errors import DataError, NonFiniteError, SpecError
from saebench.readouts import ZeroShot
from saebench.registry import Registry
from saebench.specs import DatasetSpec, HeadSpec
from saebench.store import Store
from saebench.zero_shot import text_classifier, zero_shot_readouts
from tests.backbone_cases import CASES, load

REGISTRY = Registry.load()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@cache
def tiny(name: str = "tiny-clip") -> Backbone:
    return load_backbone(REGISTRY.buildable(name))


@cache
def shapes() -> Dataset:
    return open_dataset(REGISTRY.dataset("shapes"))


@cache
def upstream(name: str = "tiny-clip") -> tuple[Any, Any]:
    """The model and its tokenizer, by open_clip alone."""
    spec = REGISTRY.backbone(name)
    assert spec.weights.file
    folder = (Path(spec.path).parent / spec.model.removeprefix("local-dir:")).resolve()
    logging.disable(logging.WARNING)  # it warns that it loads no weights
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    logging.disable(logging.NOTSET)
    model.load_state_dict(load_file(Path(spec.path).parent / spec.weights.file))
    merges = str(folder / "bpe_merges.txt.gz")
    return model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=merges)


def classifier(names: Sequence[str], templates: Sequence[str], name: str = "tiny-clip") -> Tensor:
    model, tokenizer = upstream(name)
    built = open_clip.build_zero_shot_classifier(model, tokenizer, list(names), list(templates))
    return built.T


class Own(Dataset):
    """A dataset of names alone."""

    splits = ("train", "test")
    decodes = False

    def __init__(self, names: dict[str, tuple[str, ...]], **fields: Any) -> None:
        super().__init__(DatasetSpec(name="own", source="own", **fields))
        self.names = names
        self.class_names = names.get("default", ("0", "1"))
        self.label_names = {}

    @property
    def text_names(self) -> dict[str, tuple[str, ...]]:
        return self.names

    def _build_manifest(self, split: str) -> Any:
        raise AssertionError("text classifiers look at no images")

    def _decode(self, split: str, index: int) -> Any:
        raise AssertionError("text classifiers look at no images")


# The classifier


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-bioclip"])
def test_the_classifiers_are_open_clips(name: str, store: Store) -> None:
    readouts = zero_shot_readouts(tiny(name), shapes(), store, "default")
    names = shapes().class_names
    templates = REGISTRY.backbone(name).head.templates["shapes"]
    ensemble, bare = classifier(names, templates, name), classifier(names, ["{}"], name)
    for readout, expected in zip(readouts, (ensemble, ensemble, bare, bare), strict=True):
        assert readout.text_cd.dtype == torch.float64
        assert torch.allclose(readout.text_cd.float(), expected, atol=2e-6, rtol=0)
        norms = readout.text_cd.norm(dim=1)
        assert torch.allclose(norms, torch.ones(48, dtype=torch.float64), atol=1e-15, rtol=0)
    assert (ensemble - bare).abs().max() > 0.05


def test_what_the_rows_say(store: Store) -> None:
    readouts = zero_shot_readouts(tiny(), shapes(), store, "default")
    own = {"loss": "zero_shot_ce", "head": "zero_shot", "names": "default"}
    scale = float(upstream()[0].logit_scale.detach().exp())
    assert [(r.columns, r.variant, r.scale) for r in readouts] == [
        (own | {"texts": "templates", "temperature": "model"}, {}, pytest.approx(scale)),
        (own | {"texts": "templates", "temperature": "1"}, {"temperature": "1"}, 1.0),
        (
            own | {"texts": "names", "temperature": "model"},
            {"texts": "names"},
            pytest.approx(scale),
        ),
        (
            own | {"texts": "names", "temperature": "1"},
            {"texts": "names", "temperature": "1"},
            1.0,
        ),
    ]
    assert {r.n_classes for r in readouts} == {48}


def test_without_templates_bare_names_are_the_default(store: Store) -> None:
    for data in (
        Own({"default": ("cat", "dog")}),
        Own({"default": ("cat", "dog")}, templates=("{}",)),
    ):
        found = zero_shot_readouts(tiny(), data, store, "default")
        assert [r.variant for r in found] == [{}, {"temperature": "1"}]
        assert {r.columns["texts"] for r in found} == {"names"}
        assert torch.allclose(
            found[0].text_cd.float(), classifier(["cat", "dog"], ["{}"]), atol=2e-6, rtol=0
        )


def test_the_backbones_templates_come_before_the_datasets(store: Store) -> None:
    data = Own({"default": ("cat", "dog")}, templates=("a {} of the dataset",))
    backbone = load_backbone(REGISTRY.buildable("tiny-clip"))
    (first, *_) = zero_shot_readouts(backbone, data, store, "default")
    expected = classifier(["cat", "dog"], ["a {} of the dataset"])
    assert torch.allclose(first.text_cd.float(), expected, atol=2e-6, rtol=0)
    head = HeadSpec(kind="zero_shot", templates={"own": ("my {}", "{} of mine")})
    backbone.spec = replace(backbone.spec, head=head)
    (first, *_) = zero_shot_readouts(backbone, data, store, "default")
    expected = classifier(["cat", "dog"], ["my {}", "{} of mine"])
    assert torch.allclose(first.text_cd.float(), expected, atol=2e-6, rtol=0)
    backbone.spec = replace(backbone.spec, head=HeadSpec(kind="zero_shot", templates={"own": ()}))
    assert len(zero_shot_readouts(backbone, data, store, "default")) == 2


def test_names_of_another_kind(store: Store) -> None:
    kinds = {"default": ("Canis lupus", "Felis catus"), "common": ("wolf", "cat")}
    data = Own(kinds, templates=("a photo of a {}.",))
    common, *_ = zero_shot_readouts(tiny(), data, store, "common")
    assert common.columns["names"] == "common"
    expected = classifier(["wolf", "cat"], ["a photo of a {}."])
    assert torch.allclose(common.text_cd.float(), expected, atol=2e-6, rtol=0)
    with pytest.raises(DataError, match="no class names of the kind 'taxonomic'") as error:
        zero_shot_readouts(tiny(), data, store, "taxonomic")
    assert error.value.hint == "it has: default, common"
    with pytest.raises(DataError, match="no class names that a text tower could read"):
        zero_shot_readouts(tiny(), Own({}), store, "default")


def test_a_template_needs_a_place_for_the_name(store: Store) -> None:
    data = Own({"default": ("cat", "dog")}, templates=("a photo of a {}.", "a photo"))
    with pytest.raises(SpecError, match="own: the template 'a photo' has no place for a name"):
        zero_shot_readouts(tiny(), data, store, "default")


def test_a_name_with_braces_is_a_name(store: Store) -> None:
    names, templates = ("{0}", "a {} b"), ("the {}",)
    expected, *_ = upstream()[0].encode_text(upstream()[1](["the {0}", "the a {} b"])).detach(), 0
    found = text_classifier(tiny(), names, templates, store).float()
    assert torch.allclose(found, torch.nn.functional.normalize(expected), atol=2e-6, rtol=0)


# Chunks


class Tower:
    """Embeds a text as a vector that its bytes seed, and counts."""

    def __init__(self) -> None:
        self.most = self.n = 0

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        self.most, self.n = max(self.most, len(texts)), self.n + len(texts)
        seeds = np.array([sum(map(ord, text)) * 31 + len(text) for text in texts])
        vectors = np.sin(seeds[:, None] * np.arange(1, 9))
        return torch.nn.functional.normalize(torch.from_numpy(vectors).float())


def test_very_many_texts_are_never_all_in_memory() -> None:
    """1,000 classes and 80 templates, beside a twin in NumPy; 37 classes do not divide evenly."""
    names = [f"species {number}" for number in range(1000)]
    templates = [f"{'very ' * number}{{}}" for number in range(80)]
    tower: Any = Tower()
    found = zero_shot._averaged(tower, names, templates)
    assert (tower.n, found.dtype) == (80_000, np.float32)
    assert tower.most <= text_embeddings.CHUNK
    for c in (0, 24, 25, 999):
        texts = [template.format(names[c]) for template in templates]
        mean_d = Tower().encode_text(texts).double().numpy().mean(axis=0)
        assert np.allclose(found[c], mean_d / np.linalg.norm(mean_d), atol=1e-7)


def test_chunks_do_not_move_a_classifier(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    names, templates = shapes().class_names, ("a {}", "the {}", "one {}")
    whole = text_classifier(tiny(), names, templates, store)
    monkeypatch.setattr(zero_shot, "CHUNK", 7)
    again = text_classifier(tiny(), names, templates, Store(store.root / "other"))
    assert torch.allclose(whole, again, atol=1e-6, rtol=0)


# Artifacts


def test_a_classifier_is_embedded_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = zero_shot_readouts(tiny(), shapes(), store, "default")
    assert len(store.ids("text_classifier")) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "encode_text", lambda *_: pytest.fail("it is embedded again"))
        again = zero_shot_readouts(tiny(), shapes(), Store(store.root), "default")
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.text_cd, other.text_cd)


def test_all_that_can_change_it_is_in_its_key(store: Store) -> None:
    names, templates = ("cat", "dog"), ("a {}", "the {}")

    def ids(backbone: Backbone, names: Sequence[str], templates: Sequence[str]) -> set[str]:
        text_classifier(backbone, names, templates, store)
        return set(store.ids("text_classifier"))

    assert len(ids(tiny(), names, templates)) == 1
    assert len(ids(tiny(), names, templates)) == 1
    assert len(ids(tiny(), names[::-1], templates)) == 2
    assert len(ids(tiny(), names, templates[:1])) == 3
    assert len(ids(tiny(), ("cat", "dig"), templates)) == 4
    assert len(ids(tiny("tiny-bioclip"), names, templates)) == 5, "of other weights"
    half = load_backbone(REGISTRY.buildable("tiny-clip"), dtype=torch.bfloat16)
    assert len(ids(half, names, templates)) == 6, "of another dtype"
    fields = text_embeddings.text_identity(tiny())["backbone"]
    assert set(fields["model_files"]) == {"open_clip_config.json", "bpe_merges.txt.gz"}
    assert fields["weights"] == REGISTRY.backbone("tiny-clip").weights.sha256
    assert "site" not in fields


def test_a_tower_in_half_precision(store: Store) -> None:
    half = load_backbone(REGISTRY.buildable("tiny-clip"), dtype=torch.bfloat16)
    first, *_ = zero_shot_readouts(half, shapes(), store, "default")
    whole, *_ = zero_shot_readouts(tiny(), shapes(), store, "default")
    assert first.text_cd.dtype == torch.float64
    assert torch.allclose(first.text_cd.norm(dim=1), torch.ones(48, dtype=torch.float64))
    worst = float((first.text_cd * whole.text_cd).sum(dim=1).min())
    assert 0.99 < worst < 1 - 1e-9
    assert first.scale == whole.scale


def test_embeddings_that_are_not_finite_are_not_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "encode_text", lambda *_: torch.full((2, 64), torch.nan))
    with pytest.raises(NonFiniteError, match="near 'a cat'"):
        text_classifier(tiny(), ("cat", "dog"), ("a {}",), store)
    assert not store.ids()


# What a model does with it


@torch.inference_mode()
def test_accuracy_is_that_of_a_plain_script(store: Store) -> None:
    """open_clip's model, tokenizer and classifier, and pixels by hand."""
    data, backbone = shapes(), tiny()
    manifest = data.manifest("test")
    order = manifest.order(384)
    pictures = [data.image("test", row) for row in order.tolist()]
    pixels = np.stack([np.asarray(image) for image in pictures]).astype(np.float32) / 255
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) - 0.5) / 0.5
    model, _ = upstream()
    templates = REGISTRY.backbone("tiny-clip").head.templates["shapes"]
    images = model.encode_image(x, normalize=True)
    labels = torch.from_numpy(manifest.labels[order])
    output = backbone.forward(torch.stack([backbone.transform(image) for image in pictures]))
    accuracies = []
    for readout in zero_shot_readouts(backbone, data, store, "default"):
        texts = templates if readout.columns["texts"] == "templates" else ["{}"]
        scale = 1.0 if readout.columns["temperature"] == "1" else float(model.logit_scale.exp())
        expected = scale * images @ classifier(data.class_names, texts).T
        found = readout.logits(output)
        assert found.dtype == torch.float64
        hits, wanted = ((bc.argmax(dim=1) == labels) for bc in (found, expected))
        assert torch.equal(hits, wanted)
        accuracies.append(float(hits.double().mean()))
        loss = float(cross_entropy(expected, labels))
        assert float(cross_entropy(found, labels)) == pytest.approx(loss, rel=1e-5)
    templates_model, templates_one, names_model, names_one = accuracies
    assert templates_model == templates_one > 0.35
    assert names_model == names_one < templates_model


@pytest.mark.parametrize("scale", [1.0, 14.2857, 100.0, 117.33])
@pytest.mark.parametrize("n_classes", [2, 48, 1000])
def test_equal_similarity_to_every_class_is_ln_c(scale: float, n_classes: int) -> None:
    generator = torch.Generator().manual_seed(n_classes)
    embedding_bd = torch.randn(5, 64, generator=generator)
    one_d = torch.nn.functional.normalize(torch.randn(64, generator=generator).double(), dim=0)
    readout = ZeroShot(one_d.expand(n_classes, 64), scale, {})
    for x_bd in (embedding_bd, torch.zeros(5, 64)):
        logits_bc = readout.logits(Output(x_bd, None))
        loss_b = -logits_bc.log_softmax(dim=1)[:, 0]
        assert torch.allclose(
            loss_b, torch.full_like(loss_b, math.log(n_classes)), atol=1e-14, rtol=0
        )


@torch.inference_mode()
def test_the_bias_of_a_sigmoid_loss_cancels(tmp_path: Path, store: Store) -> None:
    """A small SigLIP with random weights: open_clip's own logits have the bias, ours have not."""
    backbone = load(CASES["siglip"], tmp_path)
    model: Any = backbone.model.module
    text: Any = backbone.model.text
    names = ("cat", "dog", "whale")
    x = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    theirs, _ = model.get_logits(x, text.tokenizer([f"a photo of a {name}." for name in names]))
    text_cd = text_classifier(backbone, names, ("a photo of a {}.",), store)
    ours = ZeroShot(text_cd, backbone.logit_scale, {}).logits(backbone.forward(x))
    bias = torch.full_like(ours, backbone.logit_bias)
    assert torch.allclose(theirs.double() - ours, bias, atol=1e-5)
    assert abs(backbone.logit_bias) > 0.01
    assert torch.allclose(ours.log_softmax(dim=1).float(), theirs.log_softmax(dim=1), atol=1e-5)
