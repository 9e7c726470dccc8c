"""An entry that says what the model is not is refused, with what to write instead."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from saebench.backbones import (
    Backbone,
    Output,
    Step,
    SteppedModel,
    build_module,
    load_backbone,
    timm_models,
)
from saebench.backbones.activations import activations_of, shown
from saebench.backbones.precision import ieee_float32
from saebench.errors import Mismatch, NotFound, SaebenchError, SpecError, UsageError
from saebench.specs import BackboneSpec, HeadSpec, InputSpec, SiteSpec
from tests.backbone_cases import CASES, VIT, clip_config, images, load, pooled, spec_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("entries")


def entry(folder: Path, name: str = "vit", **fields: Any) -> BackboneSpec:
    (folder / name).mkdir(exist_ok=True)
    return replace(spec_of(CASES[name], folder / name), **fields)


def site(path: str = "blocks.1", **fields: Any) -> SiteSpec:
    return SiteSpec(**{"path": path, "width": 24, "cls": 1, "grid": (4, 4), **fields})


def said(folder: Path, name: str = "vit", **fields: Any) -> str:
    """The message and hint of the SpecError that loading an entry raises."""
    with pytest.raises(SpecError) as error:
        load_backbone(entry(folder, name, **fields))
    assert f"{name}/case.toml" in str(error.value)
    return str(error.value)


# Sites, before any image.


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("block.1", "blocks.1"),
        ("blocks.1.mpl", "blocks.1.mlp"),
        ("blocks.11", "blocks.1"),
        ("encoder.layers.1", "blocks.1"),
    ],
)
def test_a_path_that_is_not_in_the_model(wrong: str, near: str, folder: Path) -> None:
    message = said(folder, sites={"a": site(wrong)})
    assert f"no module '{wrong}'" in message
    assert near in message
    assert "site 'a'" in message


def test_a_module_of_the_text_tower_is_no_site(folder: Path) -> None:
    message = said(folder, "clip", sites={"a": site("transformer.resblocks.0", width=16)})
    assert "not on the way from the images" in message
    assert "visual.transformer.resblocks.0" in message


def test_logits_are_no_site(folder: Path) -> None:
    message = said(folder, sites={"a": pooled("head", 7)})
    assert "not on the way" in message
    assert "head (input)" in message


@pytest.mark.parametrize(
    ("path", "side", "kind", "found"),
    [
        ("blocks.1.mlp", "output", "bottleneck", "branch"),
        ("blocks.1.norm2", "input", "bottleneck", "branch"),
        ("blocks.1", "output", "branch", "bottleneck"),
        ("norm", "input", "branch", "bottleneck"),
    ],
)
def test_the_kind_of_a_site(path: str, side: Any, kind: Any, found: str, folder: Path) -> None:
    message = said(folder, sites={"a": site(path, side=side, kind=kind)})
    assert f"kind = '{kind}'" in message
    assert f"is a {found}" in message


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("vit", {"cls": 0, "registers": 1}),
        ("vit-registers", {"cls": 1, "registers": 0, "grid": (5, 4)}),  # "patches" of registers
        ("vit-registers", {"cls": 0, "registers": 5}),
        ("deit-distilled", {"cls": 1, "registers": 1}),
        ("clip", {"path": "visual.transformer.resblocks.0", "width": 32, "registers": 1, "cls": 0}),
        ("vit", {"path": "blocks.1.mlp", "kind": "branch", "cls": 0, "registers": 1}),
        ("vit", {"grid": (7, 7)}),
        ("vit", {"cls": 2}),
        ("vit-registers", {}),
        ("dinov3", {"registers": 3}),
        ("dinov3-cls", {"cls": 0, "registers": 5}),
        ("eva02", {"registers": 4}),
        ("vit-dynamic", {"grid": (8, 8)}),
        ("siglip", {"path": "visual.trunk.blocks.0", "width": 96, "grid": (10, 10)}),
    ],
)
def test_tokens_that_are_not_the_models(name: str, tokens: dict[str, Any], folder: Path) -> None:
    message = said(folder, name, sites={"a": site(**tokens)})
    assert "its tokens are" in message
    assert "and the model's are" in message


@pytest.mark.parametrize("name", ["vit", "dinov3", "vit-dynamic"])
def test_a_grid_of_as_many_patches_in_another_shape(name: str, folder: Path) -> None:
    registers = 4 if name == "dinov3" else 0
    message = said(folder, name, sites={"a": site(grid=(2, 8), registers=registers)})
    assert "grid = [2, 8], and the model's is [4, 4]" in message


# Shapes, on the first batch.

LAYER2 = {"path": "layer2", "layout": "map", "width": 128, "cls": 0}
STAGE = {"path": "stages.1", "layout": "map", "width": 16, "cls": 0}
MLP = {
    "path": "stages.1.blocks.1.mlp",
    "kind": "branch",
    "layout": "channels_last",
    "width": 16,
    "cls": 0,
}


@pytest.mark.parametrize(
    ("name", "fields", "found", "declared", "hint"),
    [
        ("vit", {"width": 32}, [3, 17, 24], [3, 17, 32], "width 24"),
        ("vit", {"cls": 0}, [3, 17, 24], [3, 16, 24], "17 tokens"),
        ("vit-registers", {"cls": 0}, [3, 21, 24], [3, 16, 24], "21 tokens"),
        ("vit", {"layout": "map"}, [3, 17, 24], [3, 24, 4, 4], 'layout = "tokens"'),
        ("vit", {"layout": "pooled"}, [3, 17, 24], [3, 24], 'layout = "tokens"'),
        ("vit", {"path": "fc_norm"}, [3, 24], [3, 17, 24], 'layout = "pooled"'),
        ("resnet10t", {"path": "layer2"}, [3, 128, 4, 4], [3, 17, 24], 'layout = "map"'),
        ("resnet10t", {**LAYER2, "width": 64}, [3, 128, 4, 4], [3, 64, 4, 4], "width 128"),
        ("resnet10t", {**LAYER2, "grid": (8, 8)}, [3, 128, 4, 4], [3, 128, 8, 8], "[4, 4]"),
        ("convnext", {**MLP, "layout": "map"}, [3, 4, 4, 16], [3, 16, 4, 4], '"channels_last"'),
        ("convnext", {**MLP, "layout": "tokens"}, [3, 4, 4, 16], [3, 16, 16], '"channels_last"'),
        ("convnext", {**MLP, "width": 9}, [3, 4, 4, 16], [3, 4, 4, 9], "width 16"),
        ("convnext", {**MLP, "grid": (2, 2)}, [3, 4, 4, 16], [3, 2, 2, 16], "grid is [4, 4]"),
        ("convnext", {**STAGE, "layout": "channels_last"}, [3, 16, 4, 4], [3, 4, 4, 16], '"map"'),
        (
            "vit",
            {"path": "blocks.1.attn.q_norm", "kind": "branch"},
            [3, 2, 17, 12],
            [3, 17, 24],
            "layout",
        ),
    ],
)
def test_another_shape_names_the_site_and_both_shapes(
    name: str, fields: dict[str, Any], found: list[int], declared: list[int], hint: str,
    folder: Path,
) -> None:  # fmt: skip
    backbone = load_backbone(entry(folder, name, sites={"a": site(**fields)}))
    with pytest.raises(Mismatch) as error:
        backbone.acts(images(), ["a"])
    for part in ("site 'a'", str(found), str(declared), hint):
        assert part in str(error.value)


class Odd(nn.Module):
    """Wraps a block so that it returns its output in some other form."""

    def __init__(self, block: nn.Module, form: Any) -> None:
        super().__init__()
        self.block, self.form = block, form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.block(x))


def odd_backbone(form: Any, folder: Path) -> Backbone:
    """A ViT whose blocks.1 hands its output on in another form, seen from within one step."""
    spec = entry(folder, sites={"a": site(kind="branch")})
    model = build_module(spec)
    assert isinstance(model, nn.Module)
    model.blocks[1] = Odd(model.blocks[1], form)  # type: ignore[index, operator]

    def run(x: Tensor) -> Tensor:
        x = model.blocks[0](model._pos_embed(model.patch_embed(x)))  # type: ignore
        model.blocks[1](x)  # type: ignore[index, operator]
        return x[:, 0]

    return Backbone(spec, SteppedModel(model, (Step(run, modules=("blocks",)),), Output))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x: (x, x + 1), "a tuple of 2 different tensors: [3, 17, 24], [3, 17, 24]"),
        (lambda x: {"hidden": x}, "a dict"),
        (lambda _: (), "a tuple of 0 different tensors"),
        (lambda x: x.transpose(0, 1), "the axes are [tokens, images, width]"),
        (lambda x: x[0], "the batch axis is gone"),
        (lambda x: x[:2], "not the 3 images"),
    ],
)
def test_odd_outputs_are_caught(form: Any, message: str, folder: Path) -> None:
    backbone = odd_backbone(form, folder)
    with pytest.raises(Mismatch) as error:
        backbone.acts(images(), ["a"])
    assert message in str(error.value)
    assert "site 'a'" in str(error.value)


@pytest.mark.parametrize("form", [lambda x: (x,), lambda x: (x, None), lambda x: [x, 3]])
def test_a_tuple_with_one_tensor_is_that_tensor(form: Any, folder: Path) -> None:
    plain = odd_backbone(lambda x: x, folder).acts(images(), ["a"])["a"].acts_btd
    assert odd_backbone(form, folder).acts(images(), ["a"])["a"].acts_btd.shape == plain.shape


def test_a_module_that_never_runs_is_no_site(folder: Path) -> None:
    """torch's MultiheadAttention reads the weights of `out_proj`, and does not call it."""
    path = "visual.transformer.resblocks.0.attn.out_proj"
    spec = entry(folder, "clip", sites={"a": site(path, width=32, kind="branch")})
    with pytest.raises(SpecError, match="runs 0 times"):
        load_backbone(spec).acts(images(), ["a"])


# Asking.


def test_a_site_that_the_entry_lacks(folder: Path) -> None:
    backbone = load_backbone(entry(folder))
    with pytest.raises(NotFound) as error:
        backbone.acts(images(), ["blocks.0", "block.1"])
    assert "no site 'block.1'" in str(error.value)
    assert "blocks.1" in error.value.hint
    with pytest.raises(NotFound, match="no site 'nothing'"):
        backbone.resume("nothing", torch.zeros(1, 17, 24), {})


def test_no_sites_no_pass(folder: Path) -> None:
    assert load_backbone(entry(folder)).acts(images(), []) == {}


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 32, 32), torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 32, 32)]
)
def test_images_of_another_shape(x: Tensor, folder: Path) -> None:
    backbone = load_backbone(entry(folder))
    with pytest.raises(Mismatch, match=r"takes \[b, 3, 32, 32\]"):
        backbone.forward(x)


def test_images_that_are_bytes(folder: Path) -> None:
    with pytest.raises(Mismatch, match="must be floats"):
        load_backbone(entry(folder)).forward(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(3, 16, 24), (3, 17, 25), (17, 24), (51, 24)])
def test_resuming_with_other_tokens(shape: tuple[int, ...], folder: Path) -> None:
    backbone = load_backbone(entry(folder))
    with pytest.raises(Mismatch) as error:
        backbone.resume("blocks.1", torch.zeros(shape), {})
    assert str(list(shape)) in str(error.value)
    assert "[b, 17, 24]" in str(error.value)


def test_resuming_a_branch_needs_its_state(folder: Path) -> None:
    backbone = load_backbone(entry(folder))
    capture = backbone.acts(images(), ["mlp"])["mlp"]
    with pytest.raises(Mismatch, match="without it"):
        backbone.resume("mlp", capture.acts_btd, {})
    with pytest.raises(Mismatch, match="of 3 images, for 2 images"):
        backbone.resume("mlp", capture.acts_btd[:2], capture.state)


def test_texts_need_a_text_tower(folder: Path) -> None:
    backbone = load_backbone(entry(folder))
    with pytest.raises(UsageError, match="no text tower"):
        backbone.encode_text(["a cat"])
    with pytest.raises(UsageError, match="no text tower"):
        _ = backbone.logit_scale
    with pytest.raises(UsageError, match="no texts"):
        load_backbone(entry(folder, "clip")).encode_text([])


# Activation functions.


@pytest.mark.parametrize(
    ("act_layer", "name"),
    [
        ("gelu", "gelu"),
        ("gelu_tanh", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("relu6", "relu6"),
        ("silu", "silu"),
        ("hard_swish", "hard_swish"),
    ],
)
def test_the_activation_function_of_a_model(act_layer: str, name: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **VIT, act_layer=act_layer)
    assert activations_of(model) == {name}


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_quick_gelu_weights_in_a_gelu_model(name: str, folder: Path) -> None:
    message = said(folder, name, activation="quick_gelu")
    assert "activation = 'quick_gelu'" in message
    assert "is built with gelu" in message
    assert "force_quick_gelu" in message or "act_layer" in message


def test_gelu_weights_in_a_quick_gelu_model(folder: Path) -> None:
    assert "built with quick_gelu" in said(folder, "clip-quick-gelu", activation="gelu")


@pytest.mark.parametrize(
    ("name", "activation", "built", "hint"),
    [
        (
            "clip-resnet",
            "quick_gelu",
            "relu",
            '"relu"; a text tower has text_activation',
        ),
        ("mobilenetv2", "relu", "relu6", 'activation = "relu6"'),
        ("mobilenetv3", "relu", "hard_swish, relu", "leave activation out"),
        ("eva02", "gelu", "silu", 'activation = "silu"'),
        ("clip-trunk-convnext", "gelu", "gelu_tanh", "trained with"),
    ],
)
def test_other_activations(name: str, activation: str, built: str, hint: str, folder: Path) -> None:
    message = said(folder, name, activation=activation)
    assert f"is built with {built}\n" in message
    assert hint in message


def test_quick_gelu_can_be_forced(folder: Path) -> None:
    forced = {"force_quick_gelu": True}
    spec = entry(folder, "clip", model_args=forced, activation="quick_gelu")
    quick, plain = load_backbone(spec), load_backbone(entry(folder, "clip"))
    x = images()
    assert not torch.equal(quick.forward(x).embedding_bd, plain.forward(x).embedding_bd)


def test_open_clips_tanh_gelu_is_told_apart(tmp_path: Path) -> None:
    config = clip_config(act_kwargs={"approximate": "tanh"})
    case = replace(CASES["clip"], config=config, activation="gelu_tanh")
    load(case, tmp_path)
    with pytest.raises(SpecError, match="is built with gelu_tanh"):
        load_backbone(spec_of(replace(case, activation="gelu"), tmp_path))


def zero_shot(spec: BackboneSpec, **fields: Any) -> BackboneSpec:
    return replace(spec, head=HeadSpec(kind="zero_shot"), **fields)


def test_a_resnets_text_tower_has_an_activation_of_its_own(folder: Path, tmp_path: Path) -> None:
    right = zero_shot(entry(folder, "clip-resnet"), text_activation="quick_gelu")
    load_backbone(right)
    with pytest.raises(SpecError, match=r"text_activation is not said[\s\S]*with quick_gelu"):
        load_backbone(replace(right, text_activation=None))
    load_backbone(replace(right, text_activation=None, head=HeadSpec()))  # nobody reads texts
    # The plain name: the same file and the same image tower, and GELU for the texts.
    case = CASES["clip-resnet"]
    assert case.config is not None
    plain = {key: value for key, value in case.config.items() if key != "quick_gelu"}
    wrong = zero_shot(spec_of(replace(case, config=plain), tmp_path), text_activation="quick_gelu")
    with pytest.raises(SpecError, match=r"built with gelu\n[\s\S]*-quickgelu"):
        load_backbone(wrong)


def test_a_text_tower_beside_a_transformer_is_like_it(tmp_path: Path) -> None:
    """SigLIP 2's is not: the exact GELU for images, tanh's for texts."""
    config: Any = json.loads(json.dumps(CASES["siglip"].config))
    config["text_cfg"]["act_kwargs"] = {"approximate": "tanh"}
    case = replace(CASES["siglip"], config=config, activation="gelu")
    spec = zero_shot(spec_of(case, tmp_path))
    with pytest.raises(SpecError, match=r'gelu_tanh\n[\s\S]*text_activation = "gelu_tanh"'):
        load_backbone(spec)
    load_backbone(replace(spec, text_activation="gelu_tanh"))


def test_a_text_activation_without_a_text_tower(folder: Path) -> None:
    assert "has no text tower" in said(folder, "vit", text_activation="gelu")


@pytest.mark.parametrize(
    ("name", "fields", "line"),
    [
        ("vit", {"activation": "gelu"}, "activation gelu"),
        ("vit", {"activation": None}, "activation gelu (not declared)"),
        (
            "clip-resnet",
            {"text_activation": "quick_gelu"},
            "activation relu, of its text tower quick_gelu",
        ),
        ("clip", {"activation": "gelu"}, "activation gelu, of its text tower gelu (not declared)"),
    ],
)
def test_which_activations_are_shown(
    name: str, fields: dict[str, Any], line: str, folder: Path
) -> None:
    backbone = load_backbone(entry(folder, name, **fields))
    assert shown(backbone.spec, backbone.model) == line


# Models, heads, input.


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("vit", {"model": "vit_tiny_patch16_22"}, "the nearest: vit_tiny_patch16_224"),
        ("vit", {"model_args": {"depht": 3}}, "timm cannot build"),
        ("vit", {"model_args": {"pretrained": True}}, "weights go under"),
        ("vit", {"model_args": {"checkpoint_path": "x"}}, "weights go under"),
        ("clip", {"model": "VIT-B-16"}, "the nearest: ViT-B-16"),
        ("clip", {"model": "local-dir:nowhere"}, "has no open_clip_config.json"),
        ("clip", {"model_args": {"pretrained": "openai"}}, "model_args.pretrained is not used"),
        ("vit", {"input": InputSpec(size=64)}, "the model takes (32, 32)"),
        ("clip", {"input": InputSpec(size=64)}, "the model takes (32, 32)"),
        (
            "dinov3",
            {"input": InputSpec(size=36)},
            "and the model takes whole patches",
        ),
        ("vit-dynamic", {"input": InputSpec(size=36)}, "the next is 40"),
        ("clip-resnet", {"input": InputSpec(size=32)}, "the model takes (64, 64)"),
        ("siglip", {"input": InputSpec(size=32)}, "the model takes (160, 160)"),
        ("vit", {"head": HeadSpec(kind="zero_shot")}, "no text tower"),
        ("vit-registers", {"head": HeadSpec(kind="classifier")}, "the model has none"),
        (
            "vit",
            {"head": HeadSpec(kind="classifier", classes={"digits": (3, 5)})},
            "head.classes.digits = [3, 5] is not within the model's 7 classes",
        ),
        ("vit", {"loader": "tim"}, "no loader 'tim'"),
    ],
)
def test_entries_that_do_not_fit_the_model(
    name: str, fields: Mapping[str, Any], message: str, folder: Path
) -> None:
    assert message in said(folder, name, **fields)


def test_a_pooling_that_leaves_tokens(folder: Path) -> None:
    args = {**CASES["vit"].model_args, "global_pool": ""}
    backbone = load_backbone(entry(folder, model_args=args))
    with pytest.raises(Mismatch, match=r"ends in \[3, 17, 24\], not in one vector"):
        backbone.forward(images())


def test_a_forward_pass_that_is_not_known(tmp_path: Path) -> None:
    case = replace(CASES["vit"], model="test_mambaout", model_args={"num_classes": 3}, sites={})
    with pytest.raises(SpecError, match=r"\(MambaOut\) is not known here"):
        load(replace(case, activation=None), tmp_path)


def test_a_subclass_with_a_forward_pass_of_its_own_is_not_taken_for_its_parent() -> None:
    class Other(timm.models.vision_transformer.VisionTransformer):  # type: ignore[name-defined]
        def forward_features(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
            return x

    assert timm_models.stepped(Other(**VIT)) is None


def test_no_device(folder: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no GPU"):
            load_backbone(entry(folder), device="cuda")


def test_building_leaves_logging_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, disabled = list(logging.root.handlers), logging.root.manager.disable
    load_backbone(entry(folder, "clip"))
    assert not caplog.records
    assert logging.root.handlers == before
    assert logging.root.manager.disable == disabled


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_off_within_and_as_it_was_after(allowed: bool) -> None:
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        with ieee_float32(torch.device("cuda")):
            assert not any(backend.allow_tf32 for backend in backends)
        assert all(backend.allow_tf32 == allowed for backend in backends)
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


# A user's own loader.

OWN = """
import torch
import timm
from torch import nn
from saebench.backbones import Backbone, Output, Step, SteppedModel, timm_models

RAN = []

def vit(spec):
    RAN.append(spec.name)
    return timm.create_model("vit_tiny_patch16_224", **spec.model_args)

def stepped(spec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Flatten(2), nn.Linear(16, 5))
    return SteppedModel(
        model,
        (
            Step(model[0], modules=("0",), starts=("0",), ends=("0",)),
            Step(model[1], modules=("1",), starts=("1",), ends=("1",)),
            Step(lambda x: model[3](model[2](x)).mean(1)),
        ),
        Output,
    )

def backbone(spec):
    return Backbone(spec, timm_models.stepped(vit(spec)))

def nothing(spec):
    return None

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_module_from_a_users_function(own: str, folder: Path) -> None:
    backbone = load_backbone(entry(folder, loader=f"{own}:vit"))
    assert sys.modules[own].RAN == ["case"]  # type: ignore[attr-defined]
    x = images()
    known = load_backbone(entry(folder))  # the same weights, loaded from the same file
    assert torch.equal(backbone.forward(x).embedding_bd, known.forward(x).embedding_bd)


def test_steps_from_a_users_function(own: str, folder: Path) -> None:
    sites = {"map": SiteSpec(path="1", layout="map", width=8, grid=(4, 4))}
    fields: dict[str, Any] = {"activation": "relu", "head": HeadSpec()}
    spec = entry(folder, loader=f"{own}:stepped", sites=sites, **fields)
    backbone = load_backbone(replace(spec, weights=type(spec.weights)()))
    assert backbone.weights_sha256 is None
    x = images()
    capture = backbone.acts(x, ["map"])["map"]
    assert capture.acts_btd.shape == (3, 16, 8)
    output = backbone.resume("map", capture.acts_btd.contiguous(), capture.state)
    assert torch.equal(output.embedding_bd, backbone.forward(x).embedding_bd)


def test_a_backbone_from_a_users_function(own: str, folder: Path) -> None:
    assert isinstance(load_backbone(entry(folder, loader=f"{own}:backbone")), Backbone)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("vitt", "has no function 'vitt'"),
        ("number", "has no function 'number'"),
        ("nothing", "returned a NoneType"),
    ],
)
def test_a_users_function_that_is_not_one(
    function: str, message: str, own: str, folder: Path
) -> None:
    assert message in said(folder, loader=f"{own}:{function}")


def test_a_users_package_that_is_not_there(folder: Path) -> None:
    assert "no module 'no_such_package'" in said(folder, loader="no_such_package.models:vit")


def test_an_error_within_a_users_module_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (tmp_path / "broken_loader.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as error:
        load_backbone(entry(folder, loader="broken_loader:vit"))
    assert not isinstance(error.value, SaebenchError)
