"""What a linear head reads of the final sequence of tokens, against the libraries' own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saebench.backbones import Backbone, Output, Step, SteppedModel, load_backbone
from saebench.backbones.checks import check_entry
from saebench.errors import Mismatch, SpecError
from saebench.specs import HeadSpec, InputSpec, SiteSpec
from tests.backbone_cases import CASES, images, load, spec_of, upstream

BOTH = HeadSpec(features=("cls", "patches"))
PATCHES = HeadSpec(features=("patches",))

# case -> (CLS tokens, tokens before the patches), as the library says below
READABLE: dict[str, tuple[int, int]] = {
    "vit": (1, 1),
    "vit-registers": (1, 5),
    "vit-no-embed-class": (1, 3),
    "vit-dynamic": (1, 1),
    "vit-attention-pool": (0, 0),
    "deit-distilled": (1, 2),
    "dinov3-cls": (1, 5),
    "eva-attention-pool": (1, 1),
    "clip": (1, 1),
    "clip-average": (1, 1),
    "siglip": (0, 1),
    "clip-trunk-projected": (1, 1),
}
# Conv nets, and models whose final norm comes after pooling.
UNREADABLE = ["resnet10t", "resnetv2", "convnext", "mobilenetv3", "clip-resnet", "vit-average"]
UNREADABLE += ["eva02", "clip-norm-after-pool", "clip-attention-pool", "clip-trunk-convnext"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sequence")


_loaded: dict[str, Backbone] = {}


def backbone_of(name: str, folder: Path) -> Backbone:
    """With a head that reads all that the model has."""
    if name not in _loaded:
        (folder / name).mkdir(exist_ok=True)
        head = BOTH if READABLE[name][0] else PATCHES
        _loaded[name] = load(CASES[name], folder / name, head=head)
    return _loaded[name]


def normed_upstream(model: Any, x: Tensor) -> Tensor:
    """The normed sequence [b t d], by the library alone."""
    with torch.inference_mode():
        if hasattr(model, "forward_features"):
            return model.forward_features(x)
        visual: Any = model.visual
        if hasattr(visual, "trunk"):
            return visual.trunk.forward_features(x)
        return visual.ln_post(visual.transformer(visual._embeds(x)))


def wanted_of(name: str, normed_btd: Tensor) -> Tensor:
    """DINOv2's `x_norm_clstoken`, then the mean of its `x_norm_patchtokens`, in float64."""
    n_cls, n_prefix = READABLE[name]
    side = int((normed_btd.shape[1] - n_prefix) ** 0.5)
    assert side**2 == normed_btd.shape[1] - n_prefix
    tokens = normed_btd.double()
    mean_bd = torch.stack([image[n_prefix:].sum(0) / side**2 for image in tokens])
    return torch.cat([tokens[:, 0], mean_bd], dim=1) if n_cls else mean_bd


@pytest.mark.parametrize("name", READABLE)
def test_cls_and_the_mean_of_the_patches(name: str, folder: Path) -> None:
    backbone, case = backbone_of(name, folder), CASES[name]
    x = images(size=case.size)
    found = backbone.forward(x)
    assert found.features_bd is not None
    assert found.read_bd is found.features_bd
    model = upstream(case, folder / name)
    wanted = wanted_of(name, normed_upstream(model, x))
    torch.testing.assert_close(found.read_bd.double(), wanted, rtol=1e-5, atol=1e-5)
    plain = load_backbone(replace(backbone.spec, head=HeadSpec()))
    assert plain.model.sequence == backbone.model.sequence
    output = plain.forward(x)
    assert torch.equal(output.embedding_bd, found.embedding_bd)
    assert output.features_bd is None
    assert output.read_bd is output.embedding_bd


@pytest.mark.parametrize("features", [("cls",), ("patches",), ("patches", "cls")])
def test_the_order_is_the_entrys(features: Any, folder: Path) -> None:
    whole = backbone_of("vit-registers", folder)
    backbone = load_backbone(replace(whole.spec, head=HeadSpec(features=features)))
    cls_bd, patches_bd = whole.forward(images()).read_bd.split(24, dim=1)
    wanted = {"cls": cls_bd, "patches": patches_bd}
    found = backbone.forward(images()).read_bd
    assert torch.equal(found, torch.cat([wanted[feature] for feature in features], dim=1))


def test_registers_and_a_distillation_token_are_in_neither(folder: Path) -> None:
    for name, part in (("vit-registers", slice(1, 5)), ("deit-distilled", slice(1, 2))):
        backbone, x = backbone_of(name, folder), images()
        capture = backbone.acts(x, ["normed"])["normed"]
        clean = backbone.resume("normed", capture.acts_btd, capture.state)
        changed_btd = capture.acts_btd.clone()
        changed_btd[:, part] = 7.0
        output = backbone.resume("normed", changed_btd, capture.state)
        assert torch.equal(output.read_bd, clean.read_bd)


@pytest.mark.parametrize("name", READABLE)
def test_they_resume_bit_for_bit_from_every_site(name: str, folder: Path) -> None:
    backbone = backbone_of(name, folder)
    x = images(size=CASES[name].size)
    clean = backbone.forward(x)
    captures = backbone.acts(x, list(backbone.spec.sites))
    for site, capture in captures.items():
        output = backbone.resume(site, capture.acts_btd, capture.state)
        assert torch.equal(output.read_bd, clean.read_bd), site
        alone = backbone.acts(x, [site])[site]
        assert alone.state.keys() == capture.state.keys(), site
        # Only what lies after the sequence leaves it alone.
        output = backbone.resume(site, 0.5 * capture.acts_btd + 0.1, capture.state)
        kept = "features" in capture.state
        assert torch.equal(output.read_bd, clean.read_bd) == kept, site
        assert kept == (backbone.spec.sites[site].layout == "pooled"), site
        edits = {site: lambda acts_btd: 0.5 * acts_btd + 0.1}
        start = next(iter(backbone.in_order(captures)))
        if backbone._sites.depth(site) > backbone._sites.depth(start):
            first = captures[start]
            edited = backbone.resume(start, first.acts_btd, first.state, edits)
            assert torch.equal(edited.read_bd, output.read_bd), site


def test_a_site_after_the_sequence_needs_its_state(folder: Path) -> None:
    backbone = backbone_of("vit", folder)
    capture = backbone.acts(images(), ["fc_norm"])["fc_norm"]
    with pytest.raises(Mismatch) as error:
        backbone.resume("fc_norm", capture.acts_btd, {})
    assert "the linear head reads tokens that lie before it, and the state is without" in str(
        error.value
    )
    with pytest.raises(Mismatch, match="the state is of 3 images, for 2 images"):
        backbone.resume("fc_norm", capture.acts_btd[:2], capture.state)


def test_half_precision_features(folder: Path) -> None:
    whole = backbone_of("vit", folder)
    half = load_backbone(whole.spec, dtype=torch.bfloat16)
    captures = half.acts(images(), ["blocks.1", "fc_norm"])
    outputs = [half.resume(site, c.acts_btd.float(), c.state) for site, c in captures.items()]
    for output in outputs:
        assert output.read_bd.dtype == torch.bfloat16
        assert torch.equal(output.read_bd, half.forward(images()).read_bd)


@pytest.mark.parametrize("name", UNREADABLE)
def test_models_without_such_a_sequence(name: str, folder: Path) -> None:
    (folder / name).mkdir(exist_ok=True)
    spec = spec_of(CASES[name], folder / name)
    with pytest.raises(SpecError) as error:
        load_backbone(replace(spec, head=PATCHES))
    assert "head.features = ['patches'], and the model has no final, normed sequence" in str(
        error.value
    )
    assert 'or write ["embedding"]' in str(error.value)
    assert load_backbone(spec).model.sequence is None


@pytest.mark.parametrize("name", ["siglip", "vit-attention-pool"])
def test_models_without_a_cls_token(name: str, folder: Path) -> None:
    backbone_of(name, folder)
    spec = spec_of(CASES[name], folder / name)
    with pytest.raises(SpecError, match=r"'cls', 'patches'\], and the model has no CLS token"):
        load_backbone(replace(spec, head=BOTH))


def own_model(**fields: Any) -> SteppedModel:
    """A user's: 8×8 pixels -> one CLS token and 2×2 patches of width 3 -> their mean."""
    norm = nn.LayerNorm(3)

    def tokens(x: Tensor) -> Tensor:
        patches_btd = x.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).flatten(2).transpose(1, 2)
        return torch.cat([patches_btd.mean(1, keepdim=True), patches_btd], dim=1)

    steps = (
        Step(tokens, modules=("",)),
        Step(norm, modules=("norm",), ends=("norm",)),
        Step(lambda x: x.mean(1)),
    )
    module = nn.ModuleDict({"norm": norm})
    given = {"prefix": {"cls": 1}, "grid": (2, 2), "sequence": 2, **fields}
    return SteppedModel(module=module, steps=steps, read=Output, **given)


def own_spec(folder: Path) -> Any:
    sites = {"norm": SiteSpec(path="norm", width=3, cls=1, grid=(2, 2))}
    spec = spec_of(CASES["vit"], folder / "vit")
    return replace(spec, name="own", sites=sites, head=BOTH, input=InputSpec(size=8))


def test_a_users_own_model(folder: Path) -> None:
    backbone_of("vit", folder)
    model, spec = own_model(), own_spec(folder)
    check_entry(spec, model)
    backbone = Backbone(spec, model)
    x = images(size=8)
    acts_btd = backbone.acts(x, ["norm"])["norm"].acts_btd
    wanted = torch.cat([acts_btd[:, 0], acts_btd[:, 1:].mean(1)], dim=1)
    assert torch.equal(backbone.forward(x).read_bd, wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence": 4}, "sequence = 4 is not one of its boundaries"),
        ({"sequence": -1}, "sequence = -1 is not one of its boundaries"),
        ({"sequence": None}, "has no final, normed sequence"),
        ({"prefix": {}, "grid": (1, 5)}, "the model has no CLS token"),
        ({"grid": None}, "does not say how many patches"),
    ],
)
def test_a_users_model_that_does_not_say_it(
    fields: dict[str, Any], message: str, folder: Path
) -> None:
    backbone_of("vit", folder)
    spec = replace(own_spec(folder), sites={})
    with pytest.raises(SpecError, match=message):
        check_entry(spec, own_model(**fields))


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"sequence": 3}, r"is \[3, 3\], and not \[b, 1 \+ 4, d\]"),
        ({"grid": (2, 3)}, r"is \[3, 5, 3\], and not \[b, 1 \+ 6, d\]"),
        ({"prefix": {"cls": 1, "registers": 1}}, r"is \[3, 5, 3\], and not \[b, 2 \+ 4, d\]"),
    ],
)
def test_tokens_that_are_not_as_a_user_says(
    fields: dict[str, Any], found: str, folder: Path
) -> None:
    backbone_of("vit", folder)
    backbone = Backbone(replace(own_spec(folder), sites={}), own_model(**fields))
    with pytest.raises(Mismatch, match=f"the final sequence of 'own' {found}"):
        backbone.forward(images(size=8))
