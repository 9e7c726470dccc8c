"""Small backbones with random weights, one of each forward pass that saebench knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saebench.backbones import Backbone, build_module, load_backbone
from saebench.specs import BackboneSpec, HeadSpec, InputSpec, SiteSpec, WeightsSpec

SIZE = 32


@dataclass(frozen=True)
class Case:
    """A model, and the paths of its sites: bottlenecks, and branches within a block."""

    loader: str
    model: str
    model_args: Mapping[str, Any]
    sites: Mapping[str, SiteSpec]
    activation: Any = None
    config: Mapping[str, Any] | None = None  # of an open_clip folder
    size: int = SIZE


VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


def vit_sites(*, branches: bool = True, **prefix: int) -> dict[str, SiteSpec]:
    def tokens(path: str, **more: Any) -> SiteSpec:
        return SiteSpec(path=path, width=more.pop("width", 24), grid=(4, 4), **prefix, **more)

    sites = {
        "patches": SiteSpec(path="patch_embed", width=24, grid=(4, 4)),
        "embedded": tokens("norm_pre", side="input"),
        "first": tokens("blocks.0", side="input"),
        "all blocks": tokens("blocks"),
        "normed": tokens("norm"),
    }
    sites |= {f"blocks.{i}": tokens(f"blocks.{i}") for i in range(3)}
    if branches:
        sites |= {
            "attn": tokens("blocks.1.attn", kind="branch"),
            "mlp": tokens("blocks.2.mlp", kind="branch"),
            "mlp in": tokens("blocks.2.mlp", side="input", kind="branch"),
            "hidden": tokens("blocks.1.mlp.act", kind="branch", width=96),
        }
    return sites


def pooled(path: str, width: int, **more: Any) -> SiteSpec:
    return SiteSpec(path=path, layout="pooled", width=width, **more)


def conv(path: str, width: int, length: int, **more: Any) -> SiteSpec:
    return SiteSpec(path=path, layout="map", width=width, grid=(length, length), **more)


def resnet_sites(widths: tuple[int, int, int, int], last: str) -> dict[str, SiteSpec]:
    sites = {f"layer{i + 1}": conv(f"layer{i + 1}", widths[i], 8 >> i) for i in range(4)}
    return sites | {
        "stem": conv("bn1", 64, 16),
        "stage in": conv("layer2", widths[0], 8, side="input"),
        "branch": conv(f"layer2.0.{last}", widths[1], 4, kind="branch"),
        "shortcut": conv("layer2.0.downsample", widths[1], 4, kind="branch"),
        "pooled": pooled("global_pool", widths[3]),
        "read": pooled("fc", widths[3], side="input"),
    }


def eva_sites(*, hidden: int = 96, **prefix: int) -> dict[str, SiteSpec]:
    """As a VisionTransformer's; but its blocks are a list, which is no module that runs."""
    sites = {name: site for name, site in vit_sites(**prefix).items() if site.path != "blocks"}
    attn_in = {"side": "input", "kind": "branch"}
    return sites | {
        "attn in": replace(sites["attn"], **attn_in),  # beside it stands the rotary table
        "hidden": replace(sites["hidden"], width=hidden),
        "pooled": pooled("fc_norm", 24),
    }


def convnext_sites(inner: str) -> dict[str, SiteSpec]:
    """inner: the layout of the maps within a block."""

    def inside(path: str, width: int, length: int, **more: Any) -> SiteSpec:
        return replace(conv(path, width, length, kind="branch", **more), layout=inner)

    stages = {f"stages.{i}": conv(f"stages.{i}", 8 * (i + 1), 8 >> i) for i in range(4)}
    return stages | {
        "stem conv": conv("stem.0", 8, 8),
        "stem": conv("stem", 8, 8),
        "stage in": conv("stages.2", 16, 4, side="input"),
        "downsample": conv("stages.1.downsample", 16, 4),
        "downsample norm": conv("stages.1.downsample.0", 8, 8, kind="branch"),
        "block": conv("stages.1.blocks.0", 16, 4),
        "blocks": conv("stages.1.blocks", 16, 4),
        "depthwise": conv("stages.1.blocks.1.conv_dw", 16, 4, kind="branch"),
        "norm": inside("stages.1.blocks.1.norm", 16, 4),
        "norm in": inside("stages.1.blocks.1.norm", 16, 4, side="input"),
        "mlp": inside("stages.1.blocks.1.mlp", 16, 4),
        "hidden": inside("stages.0.blocks.0.mlp.act", 32, 8),
        "norm_pre": conv("norm_pre", 32, 1),
        "pooled": pooled("head.drop", 32),
        "read": pooled("head.fc", 32, side="input"),
    }


def efficientnet_sites(widths: tuple[int, ...], stem: int, last: int) -> dict[str, SiteSpec]:
    """Of the stages at 1/2, 1/4, … of an image of 64 pixels."""
    lengths = (32, 16, 8, 4, 4, 2, 2)
    stages = {
        f"blocks.{i}": conv(f"blocks.{i}", width, lengths[i]) for i, width in enumerate(widths)
    }
    return stages | {
        "stem conv": conv("conv_stem", stem, 32),
        "stem": conv("bn1", stem, 32),
        "block": conv("blocks.2.0", widths[2], 8),
        "all blocks": conv("blocks", widths[-1], lengths[len(widths) - 1]),
        "bn in block": conv("blocks.2.1.bn3", widths[2], 8, kind="branch"),
        "depthwise": conv("blocks.2.1.conv_dw", 6 * widths[2], 8, kind="branch"),
        "read": pooled("classifier", last, side="input"),
    }


def clip_resnet_sites() -> dict[str, SiteSpec]:
    widths = (64, 128, 256, 512)
    sites = {f"layer{i + 1}": conv(f"visual.layer{i + 1}", widths[i], 16 >> i) for i in range(4)}
    return sites | {
        "stem": conv("visual.avgpool", 16, 16),
        "stage in": conv("visual.layer3", 128, 8, side="input"),
        "branch": conv("visual.layer2.0.bn3", 128, 8, kind="branch"),
        "shortcut": conv("visual.layer2.0.downsample", 128, 8, kind="branch"),
        "attnpool": pooled("visual.attnpool", 16),
        "embedding": pooled("visual", 16),
    }


def trunk_sites(width: int, embedding: int, **prefix: int) -> dict[str, SiteSpec]:
    """Of timm's `test_vit` models, whose images are of 160 pixels."""

    def tokens(path: str, **more: Any) -> SiteSpec:
        where: dict[str, Any] = {"path": f"visual.trunk.{path}", "width": width, "grid": (10, 10)}
        return SiteSpec(**{**where, **prefix, **more})

    return {
        "blocks.0": tokens("blocks.0"),
        "blocks.1": tokens("blocks.1"),
        "all blocks": tokens("blocks"),
        "attn": tokens("blocks.1.attn", kind="branch"),
        "mlp": tokens("blocks.0.mlp", kind="branch"),
        "trunk": pooled("visual.trunk", width),
        "embedding": pooled("visual", embedding),
    }


def clip_sites() -> dict[str, SiteSpec]:
    def tokens(path: str, **more: Any) -> SiteSpec:
        return SiteSpec(path=f"visual.{path}", width=32, cls=1, grid=(4, 4), **more)

    return {
        "before": tokens("ln_pre", side="input", kind="branch"),
        "pre": tokens("ln_pre"),
        "blocks.0": tokens("transformer.resblocks.0"),
        "blocks.1": tokens("transformer.resblocks.1"),
        "tower": tokens("transformer"),
        "attn": tokens("transformer.resblocks.1.attn", kind="branch"),
        "attn in": tokens("transformer.resblocks.1.attn", side="input", kind="branch"),
        "mlp": tokens("transformer.resblocks.0.mlp", kind="branch"),
        "embedding": pooled("visual", 16),
    }


def clip_config(**vision: Any) -> dict[str, Any]:
    quick_gelu = vision.pop("quick_gelu", False)
    return {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": SIZE,
            "patch_size": 8,
            "width": 32,
            "layers": 2,
            "head_width": 16,
            **vision,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }


def _trunk(
    name: str,
    sites: Mapping[str, SiteSpec],
    embedding: int,
    activation: str = "gelu",
    **vision: Any,
) -> Case:
    """As SigLIP: a timm trunk, and a text tower of its own."""
    trunk = {"image_size": 160, "timm_model_name": name, "timm_model_pretrained": False}
    config = {
        **clip_config(),
        "embed_dim": embedding,
        "vision_cfg": {**trunk, **vision},
        "custom_text": True,
        "init_logit_bias": -10,
    }
    return Case("open_clip", "local-dir:clip", {}, sites, activation, config, size=160)


def _vit(sites: Mapping[str, SiteSpec], **args: Any) -> Case:
    return Case("timm", "vit_tiny_patch16_224", {**VIT, **args}, sites, "gelu")


def _clip(sites: Mapping[str, SiteSpec], **vision: Any) -> Case:
    activation = "quick_gelu" if vision.get("quick_gelu") else "gelu"
    config = clip_config(**vision)
    return Case("open_clip", "local-dir:clip", {}, sites, activation, config)


_CLS = vit_sites(cls=1) | {
    "head": pooled("head", 24, side="input"),
    "fc_norm": pooled("fc_norm", 24),
}
_NORMED = {"normed": SiteSpec(path="visual.ln_post", width=32, cls=1, grid=(4, 4))}

CASES = {
    "vit": _vit(_CLS, num_classes=7),
    "vit-quick-gelu": replace(
        _vit(_CLS, num_classes=7, act_layer="quick_gelu"), activation="quick_gelu"
    ),
    "vit-registers": _vit(
        vit_sites(cls=1, registers=4), reg_tokens=4, init_values=0.1, num_classes=0
    ),
    "vit-no-embed-class": _vit(vit_sites(cls=1, registers=2), reg_tokens=2, no_embed_class=True),
    "vit-clip-pre-norm": _vit(vit_sites(cls=1), pre_norm=True),
    "vit-average": _vit(vit_sites(cls=1), global_pool="avg"),
    "vit-attention-pool": _vit(
        vit_sites() | {"pool": pooled("attn_pool", 24)}, global_pool="map", class_token=False
    ),
    "deit-distilled": Case(
        "timm",
        "deit_tiny_distilled_patch16_224",
        {**VIT, "num_classes": 7},
        vit_sites(cls=1, distillation=1),
        "gelu",
    ),
    "resnet10t": Case(
        "timm", "resnet10t", {"num_classes": 7}, resnet_sites((64, 128, 256, 512), "bn2")
    ),
    "resnet-bottleneck": Case(
        "timm",
        "resnet26",
        {"num_classes": 7, "layers": [1, 2, 1, 1]},
        resnet_sites((256, 512, 1024, 2048), "bn3"),
        "relu",
    ),
    "clip": _clip(clip_sites() | _NORMED),
    "clip-quick-gelu": _clip(clip_sites() | _NORMED, quick_gelu=True),
    "clip-average": _clip(clip_sites() | _NORMED, pool_type="avg"),
    "clip-norm-after-pool": _clip(clip_sites(), final_ln_after_pool=True),
    "clip-attention-pool": _clip(
        clip_sites(), attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=4
    ),
}


DINOV3 = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 7}
EVA = {**DINOV3, "img_size": SIZE}
_NHWC = {"patches": SiteSpec(path="patch_embed", width=24, grid=(4, 4), layout="channels_last")}
_DINOV3 = eva_sites(cls=1, registers=4) | _NHWC
NEXT = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 7}
BIT = {"channels": (128, 128, 256, 256), "stem_chs": 32, "num_classes": 7}
_BIT = {
    **{f"stages.{i}": conv(f"stages.{i}", BIT["channels"][i], 8 >> i) for i in range(4)},
    "stem": conv("stem", 32, 8),
    "stem conv": conv("stem.conv", 32, 16),
    "block": conv("stages.1.blocks.1", 128, 4),
    "branch": conv("stages.1.blocks.1.conv3", 128, 4, kind="branch"),
    "preact": conv("stages.1.blocks.1.norm1", 128, 4, kind="branch"),
    "norm": conv("norm", 256, 1),
    "pool": conv("head.global_pool", 256, 1),
    "read": conv("head.fc", 256, 1, side="input"),
}
CLIP_RESNET = {"layers": [1, 2, 1, 1], "width": 16, "head_width": 64, "image_size": 64}
_SIGLIP = trunk_sites(96, 96, registers=1) | {"pool": pooled("visual.trunk.attn_pool", 96)}
_CONV_TRUNK = {
    "stages.2": conv("visual.trunk.stages.2", 96, 10),
    "mlp": replace(
        conv("visual.trunk.stages.2.blocks.0.mlp", 96, 10, kind="branch"), layout="channels_last"
    ),
    "trunk": conv("visual.trunk", 128, 5),
    "embedding": pooled("visual", 16),
}

_V3 = {
    "blocks.1": conv("blocks.1", 16, 8),
    "block": conv("blocks.4.0", 48, 2),
    "branch": conv("blocks.1.1.bn3", 16, 8, kind="branch"),
    "all blocks": conv("blocks", 288, 2),
    "pool": conv("global_pool", 288, 1),
    "wide": conv("act2", 1024, 1),
    "pooled": pooled("flatten", 1024),
}
_V4 = {
    "blocks.2": conv("blocks.2", 32, 4),
    "branch": conv("blocks.2.1.pw_proj", 32, 4, kind="branch"),
    "pool": conv("global_pool", 336, 1),
    "wide": conv("norm_head", 1280, 1),
    "pooled": pooled("flatten", 1280),
}

CASES |= {
    "dinov3": Case("timm", "vit_small_patch16_dinov3", DINOV3, _DINOV3, "gelu"),
    "dinov3-cls": Case(
        "timm",
        "vit_large_patch16_dinov3",
        {**DINOV3, "global_pool": "token", "img_size": 64, "num_classes": 0},
        _DINOV3,
        "gelu",
    ),
    "eva02": Case("timm", "eva02_tiny_patch14_224", EVA, eva_sites(cls=1, hidden=64), "silu"),
    "eva": Case("timm", "eva_giant_patch14_224", EVA, eva_sites(cls=1, hidden=104), "gelu"),
    "eva-rotary-registers": Case(
        "timm",
        "vit_medium_patch16_rope_reg1_gap_256",
        EVA,
        eva_sites(registers=1),
        "gelu",
    ),
    "eva-learned-rotary": Case(
        "timm", "vit_small_patch16_rope_mixed_224", EVA, eva_sites(cls=1), "gelu"
    ),
    "eva-attention-pool": Case(
        "timm", "vit_pe_core_tiny_patch16_384", EVA, eva_sites(cls=1), "gelu"
    ),
    "vit-dynamic": _vit(vit_sites(cls=1) | _NHWC, dynamic_img_size=True, img_size=64),
    "convnext": Case("timm", "convnext_base", NEXT, convnext_sites("channels_last"), "gelu"),
    "convnext-norm-first": Case(
        "timm", "convnext_base", {**NEXT, "head_norm_first": True}, convnext_sites("channels_last")
    ),
    "convnext-conv-mlp": Case(
        "timm", "convnext_base", {**NEXT, "conv_mlp": True, "use_grn": True}, convnext_sites("map")
    ),
    "mobilenetv2": Case(
        "timm",
        "mobilenetv2_100",
        {"num_classes": 7, "pad_type": "same"},
        efficientnet_sites((16, 24, 32, 64, 96, 160, 320), 32, 1280)
        | {"last": conv("bn2", 1280, 2), "pooled": pooled("global_pool", 1280)},
        "relu6",
        size=64,
    ),
    "efficientnet": Case(
        "timm",
        "tinynet_e",
        {"num_classes": 7},
        {
            "blocks.0": conv("blocks.0", 8, 32),
            "blocks.3": conv("blocks.3", 40, 4),
            "weighting": conv("blocks.2.0.se", 96, 8, kind="branch"),
            "last": conv("bn2", 1280, 2),
            "pooled": pooled("global_pool", 1280),
        },
        "silu",
        size=64,
    ),
    "mobilenetv3": Case(
        "timm", "mobilenetv3_small_050", {"num_classes": 7}, _V3, "hard_swish", size=64
    ),
    "mobilenetv4": Case("timm", "mobilenetv4_conv_small_035", {"num_classes": 7}, _V4, size=64),
    "resnetv2": Case("timm", "resnetv2_50x1_bit", BIT, _BIT, "relu"),
    "clip-resnet": replace(
        _clip(clip_resnet_sites(), quick_gelu=True, **CLIP_RESNET), activation="relu", size=64
    ),
    "siglip": _trunk("test_vit3", _SIGLIP, 96, timm_pool="map", timm_proj="none"),
    "clip-trunk-projected": _trunk(
        "test_vit", trunk_sites(64, 16, cls=1), 16, timm_pool="token", timm_proj="linear"
    ),
    "clip-trunk-classifier": _trunk(
        "test_vit",
        trunk_sites(64, 16, cls=1) | {"trunk": pooled("visual.trunk", 16)},
        16,
        timm_pool="avg",
        timm_proj="",
    ),
    "clip-trunk-convnext": _trunk(
        "test_convnext2", _CONV_TRUNK, 16, "gelu_tanh", timm_pool="rot_attn", timm_proj=""
    ),
}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere: as they are built, some branches would be multiplied by zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + values.abs())
            elif tensor.ndim >= 2:
                tensor.copy_(values * (2 / max(tensor[0].numel(), 1)) ** 0.5)
            else:
                tensor.copy_(0.2 * values + ("weight" in name) + 2.0 * (name == "logit_scale"))
    return module


def spec_of(case: Case, folder: Path, name: str = "case", **fields: Any) -> BackboneSpec:
    """The entry of a case, whose weights (random, seeded) and configuration lie in `folder`."""
    n_classes = case.model_args.get("num_classes", 0)
    spec = BackboneSpec(
        name=name,
        path=str(folder / f"{name}.toml"),
        family="test",
        architecture="test",
        pretraining="none",
        loader=case.loader,
        model=case.model,
        model_args=case.model_args,
        activation=case.activation,
        input=InputSpec(size=case.size),
        sites=case.sites,
        head=HeadSpec(kind="classifier" if n_classes else "none"),
    )
    if case.config is not None:
        (folder / "clip").mkdir(parents=True, exist_ok=True)
        config = {"model_cfg": case.config, "preprocess_cfg": {}}
        (folder / "clip/open_clip_config.json").write_text(json.dumps(config))
    if not (folder / "model.safetensors").is_file():
        module = build_module(spec)
        assert isinstance(module, nn.Module)
        save_file(randomise(module).state_dict(), folder / "model.safetensors")
    return replace(spec, weights=WeightsSpec(file="model.safetensors"), **fields)


def load(case: Case, folder: Path, **fields: Any) -> Backbone:
    return load_backbone(spec_of(case, folder, **fields))


_loaded: dict[Path, Backbone] = {}


def backbone_of(name: str, folder: Path) -> Backbone:
    """The backbone of a case, made below a folder once for all tests that name it there."""
    path = folder / name
    if path not in _loaded:
        path.mkdir(exist_ok=True)
        _loaded[path] = load(CASES[name], path)
    return _loaded[path]


def upstream(case: Case, folder: Path) -> Any:
    """The same model made by the library alone, in evaluation mode, once `load` has made it."""
    if case.loader == "timm":
        model = timm.create_model(case.model, **case.model_args)
    else:
        model = open_clip.create_model(f"local-dir:{folder / 'clip'}")
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def images(n: int = 3, size: int = SIZE, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator)
