"""The models that registry entries are made of, by their true names: what saebench says of them.

The architecture at its own width and image size, with random weights; transformers and ConvNeXts
are cut to one block (a stage), which changes no shape. Tokens, widths and activation functions are
those of a table that was made by running timm and open_clip by themselves.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import nn

from saebench.backbones import Backbone, open_clip_models, timm_models
from saebench.backbones.activations import activations_of
from saebench.backbones.checks import check_entry
from saebench.backbones.describe import site_specs
from saebench.backbones.steps import SteppedModel
from saebench.errors import SpecError
from saebench.specs import BackboneSpec, InputSpec, SiteSpec
from tests.backbone_cases import CASES, clip_config, images, load, randomise

CLS = {"cls": 1}
REGISTERS = {"cls": 1, "registers": 4}
TIMM: dict[str, tuple[int, dict[str, int], int, int, str]] = {
    # size, prefix, side of the grid, width, activation
    "vit_base_patch16_224.augreg_in21k": (224, CLS, 14, 768, "gelu"),
    "vit_base_patch16_224.augreg_in21k_ft_in1k": (224, CLS, 14, 768, "gelu"),
    "vit_base_patch16_clip_224.openai": (224, CLS, 14, 768, "gelu"),
    "vit_base_patch16_clip_224.openai_ft_in1k": (224, CLS, 14, 768, "gelu"),
    "vit_base_patch16_clip_quickgelu_224.openai": (224, CLS, 14, 768, "quick_gelu"),
    "vit_base_patch16_224.dino": (224, CLS, 14, 768, "gelu"),
    "vit_base_patch16_224.mae": (224, CLS, 14, 768, "gelu"),
    "deit_base_patch16_224.fb_in1k": (224, CLS, 14, 768, "gelu"),
    "deit_base_distilled_patch16_224.fb_in1k": (224, {**CLS, "distillation": 1}, 14, 768, "gelu"),
    "vit_base_patch16_siglip_224.webli": (224, {}, 14, 768, "gelu"),
    "vit_small_patch14_dinov2.lvd142m": (518, CLS, 37, 384, "gelu"),
    "vit_base_patch14_dinov2.lvd142m": (518, CLS, 37, 768, "gelu"),
    "vit_base_patch14_reg4_dinov2.lvd142m": (518, REGISTERS, 37, 768, "gelu"),
    "vit_large_patch14_reg4_dinov2.lvd142m": (224, REGISTERS, 16, 1024, "gelu"),
    "vit_large_patch14_dinov2.lvd142m": (224, CLS, 16, 1024, "gelu"),
    "vit_small_patch16_dinov3.lvd1689m": (256, REGISTERS, 16, 384, "gelu"),
    "vit_base_patch16_dinov3.lvd1689m": (256, REGISTERS, 16, 768, "gelu"),
    "vit_large_patch16_dinov3.lvd1689m": (224, REGISTERS, 14, 1024, "gelu"),
    "eva02_base_patch14_224.mim_in22k": (224, CLS, 16, 768, "silu"),
}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def check_passes(model: SteppedModel, run: Any, x: torch.Tensor) -> dict[str, SiteSpec]:
    """Steps give what the library's own forward does; each natural site is as it is described."""
    sites = site_specs(model, x.shape[-1])
    shapes: dict[str, tuple[int, ...]] = {}
    handles = [
        model.module.get_submodule(site.path).register_forward_hook(
            lambda *args, name=name: shapes.update({name: tuple(args[-1].shape)})
        )
        for name, site in sites.items()
    ]
    with torch.inference_mode():
        wanted = run(x)
        assert shapes.keys() == sites.keys()
        y = x
        for step in model.steps:
            y = step.run(y)
        output = model.read(y)
    for handle in handles:
        handle.remove()
    assert torch.equal(
        output.embedding_bd if output.logits_bc is None else output.logits_bc, wanted
    )
    for name, site in sites.items():
        by_layout = {
            "tokens": (1, site.tokens, site.width),
            "map": (1, site.width, *(site.grid or ())),
            "pooled": (1, site.width),
        }
        assert shapes[name] == by_layout[site.layout], name
    return sites


LONG = [name for name, row in TIMM.items() if row[0] * row[3] > 256 * 1024]


@pytest.mark.parametrize("name", [slow(name) if name in LONG else name for name in TIMM])
def test_timms_transformers(name: str) -> None:
    size, prefix, side, width, activation = TIMM[name]
    assert timm.is_model_pretrained(name)
    sized = {"img_size": 224} if "dinov2" in name and size == 224 else {}
    module = timm.create_model(name, depth=1, **sized).eval()
    model = timm_models.stepped(module, size)
    assert model is not None
    sites = check_passes(model, module, images(1, size=size))
    wanted = SiteSpec(path="blocks.0", width=width, grid=(side, side), **prefix)  # type: ignore[arg-type]
    assert sites["blocks.0"] == wanted
    assert sites["blocks.0"].tokens == side * side + sum(prefix.values())
    assert activations_of(module) == {activation}


@pytest.mark.parametrize(
    ("name", "args", "size", "site", "activation"),
    [
        ("resnet50.tv_in1k", {}, 224, ("layer3", 1024, 14), "relu"),
        ("resnet50.a1_in1k", {}, 224, ("layer4", 2048, 7), "relu"),
        ("resnetv2_50x1_bit.goog_in21k", {"num_classes": 3}, 224, ("stages.2", 1024, 14), "relu"),
        (
            "convnext_base.fb_in22k_ft_in1k",
            {"depths": (1, 1, 1, 1)},
            224,
            ("stages.2", 512, 14),
            "gelu",
        ),
        ("mobilenetv2_100.ra_in1k", {"pad_type": "same"}, 224, ("blocks.4", 96, 14), "relu6"),
        ("mobilenetv3_large_100.ra_in1k", {}, 224, ("blocks.4", 112, 14), "hard_swish"),
        ("efficientnet_b0.ra_in1k", {}, 224, ("blocks.4", 112, 14), "silu"),
    ],
)
def test_timms_convolutional_networks(
    name: str, args: dict[str, Any], size: int, site: tuple[str, int, int], activation: str
) -> None:
    assert timm.is_model_pretrained(name)
    module = timm.create_model(name, **args).eval()
    model = timm_models.stepped(module, size)
    assert model is not None
    sites = check_passes(model, module, images(1, size=size))
    path, width, side = site
    assert sites[path] == SiteSpec(path=path, layout="map", width=width, grid=(side, side))
    assert activations_of(module) - {"relu"} == {activation} - {"relu"}
    assert activation in activations_of(module)
    with pytest.raises(SpecError, match="any size"):
        site_specs(model)


def image_tower(name: str, folder: Path, size: int, **vision: Any) -> tuple[nn.Module, Any]:
    """An open_clip model with its own image tower, and a text tower of one small layer."""
    config = open_clip.get_model_config(name)
    assert config is not None
    config["vision_cfg"] |= vision
    config["text_cfg"] = clip_config()["text_cfg"]
    text = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    (folder / "open_clip_config.json").write_text(text)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    spec = BackboneSpec(
        name=name,
        path=str(folder / "x.toml"),
        family="clip",
        architecture=name,
        pretraining="none",
        loader="open_clip",
        model=f"local-dir:{folder}",
        input=InputSpec(size=size),
    )
    return model.eval(), open_clip_models.stepped(model, spec)


@pytest.mark.parametrize(
    ("name", "size", "side", "width", "activation"),
    [
        ("ViT-B-32-quickgelu", 224, 7, 768, "quick_gelu"),
        ("ViT-B-16-quickgelu", 224, 14, 768, "quick_gelu"),
        ("ViT-L-14-quickgelu", 224, 16, 1024, "quick_gelu"),
        slow("ViT-L-14-336-quickgelu", 336, 24, 1024, "quick_gelu"),
        ("ViT-B-32", 224, 7, 768, "gelu"),
        ("ViT-B-16", 224, 14, 768, "gelu"),
        ("ViT-L-14", 224, 16, 1024, "gelu"),
    ],
)
def test_open_clips_transformers(
    name: str, size: int, side: int, width: int, activation: str, tmp_path: Path
) -> None:
    module, model = image_tower(name, tmp_path, size, layers=1)
    sites = check_passes(model, module.encode_image, images(1, size=size))  # type: ignore[arg-type]
    path = "visual.transformer.resblocks.0"
    assert sites["blocks.0"] == SiteSpec(path=path, width=width, cls=1, grid=(side, side))
    assert list(sites) == ["blocks.0", "norm", "embedding"]
    assert activations_of(model.tower) == {activation}


def test_open_clips_resnet_is_relu_beside_a_quick_gelu_text_tower(tmp_path: Path) -> None:
    module, model = image_tower("RN50-quickgelu", tmp_path, 224)
    sites = check_passes(model, module.encode_image, images(1, size=224))  # type: ignore[arg-type]
    path = "visual.layer4"
    assert sites["layer4"] == SiteSpec(path=path, layout="map", width=2048, grid=(7, 7))
    assert sites["embedding"] == SiteSpec(path="visual", layout="pooled", width=1024)
    assert model.image_size == (224, 224)
    assert activations_of(model.tower) == {"relu"}
    assert activations_of(module) == {"relu", "quick_gelu"}


@pytest.mark.parametrize(
    ("name", "size", "side", "width", "blocks"),
    [
        slow("ViT-B-16-SigLIP", 224, 14, 768, 12),
        slow("ViT-B-16-SigLIP2", 224, 14, 768, 12),
    ],
)
def test_siglip(name: str, size: int, side: int, width: int, blocks: int, tmp_path: Path) -> None:
    module, model = image_tower(name, tmp_path, size)
    sites = check_passes(model, module.encode_image, images(1, size=size))  # type: ignore[arg-type]
    last = f"visual.trunk.blocks.{blocks - 1}"
    assert sites[f"blocks.{blocks - 1}"] == SiteSpec(path=last, width=width, grid=(side, side))
    assert sites["embedding"] == SiteSpec(path="visual", layout="pooled", width=width)
    assert model.image_size == (size, size)
    assert activations_of(model.tower) == {"gelu"}
    assert model.text is not None
    assert model.text.logit_bias == -10


@pytest.mark.parametrize("name", CASES)
def test_the_natural_sites_of_a_model_are_sites(name: str, tmp_path: Path) -> None:
    """An entry that declares them is taken, and they resume to what the model says."""
    case = CASES[name]
    backbone = load(case, tmp_path)
    sites = site_specs(backbone.model, case.size)
    assert len(sites) >= 3
    spec = replace(backbone.spec, sites=sites)
    check_entry(spec, backbone.model)
    backbone = Backbone(spec, backbone.model)
    x = images(2, size=case.size)
    full = backbone.forward(x)
    for site, capture in backbone.acts(x, list(sites)).items():
        output = backbone.resume(site, capture.acts_btd.clone(), capture.state)
        assert torch.equal(output.embedding_bd, full.embedding_bd), site
    assert {site.kind for site in sites.values()} == {"bottleneck"}


def test_describing_leaves_a_model_as_it_was() -> None:
    module = randomise(timm.create_model("test_resnet"))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.train()
    model = timm_models.stepped(module)
    assert model is not None
    site_specs(model, 64)
    assert module.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
