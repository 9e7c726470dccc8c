"""Small backbones with random weights, one of each forward pass that saebench knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
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
        input=InputSpec(size=SIZE),
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


def images(n: int = 3, size: int = SIZE, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator)
