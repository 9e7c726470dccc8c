"""The built-in backbones of full size: what upstream calls each, and how a test builds them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from saebench import paths
from saebench.backbones import SteppedModel, build_module, stepped
from saebench.registry import Origin, Registry
from saebench.specs import BackboneSpec

UPSTREAM = {
    "clip-vit-b32-openai": "open_clip:ViT-B-32/openai",
    "clip-vit-b16-openai": "open_clip:ViT-B-16/openai",
    "clip-vit-l14-openai": "open_clip:ViT-L-14/openai",
    "clip-vit-l14-336-openai": "open_clip:ViT-L-14-336/openai",
    "clip-rn50-openai": "open_clip:RN50/openai",
    "clip-vit-b32-datacomp": "open_clip:ViT-B-32/datacomp_xl_s13b_b90k",
    "clip-vit-b16-datacomp": "open_clip:ViT-B-16/datacomp_xl_s13b_b90k",
    "clip-vit-b32-laion2b": "open_clip:ViT-B-32/laion2b_s34b_b79k",
    "clip-vit-b16-laion2b": "open_clip:ViT-B-16/laion2b_s34b_b88k",
    "clip-vit-l14-laion2b": "open_clip:ViT-L-14/laion2b_s32b_b82k",
    "siglip-vit-b16": "open_clip:ViT-B-16-SigLIP/webli",
    "siglip-so400m-patch14-384": "open_clip:ViT-SO400M-14-SigLIP-384/webli",
    "siglip2-vit-b16": "open_clip:ViT-B-16-SigLIP2/webli",
    "bioclip": "hf-hub:imageomics/bioclip",
    "bioclip-2": "hf-hub:imageomics/bioclip-2",
    "dinov2-vits14": "timm:vit_small_patch14_dinov2.lvd142m",
    "dinov2-vitb14": "timm:vit_base_patch14_dinov2.lvd142m",
    "dinov2-vitl14": "timm:vit_large_patch14_dinov2.lvd142m",
    "dinov2-vits14-reg": "timm:vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2-vitb14-reg": "timm:vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-vitl14-reg": "timm:vit_large_patch14_reg4_dinov2.lvd142m",
    "dino-vitb16": "timm:vit_base_patch16_224.dino",
    "dinov3-vits16": "timm:vit_small_patch16_dinov3.lvd1689m",
    "dinov3-vitb16": "timm:vit_base_patch16_dinov3.lvd1689m",
    "dinov3-vitl16": "timm:vit_large_patch16_dinov3.lvd1689m",
    "vit-b16-augreg-in21k": "timm:vit_base_patch16_224.augreg_in21k",
    "vit-b16-augreg-in21k-ft-in1k": "timm:vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit-b16-augreg2-in21k-ft-in1k": "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit-b16-clip-openai": "timm:vit_base_patch16_clip_quickgelu_224.openai",
    "vit-b16-clip-openai-ft-in1k": "timm:vit_base_patch16_clip_224.openai_ft_in1k",
    "deit-b16": "timm:deit_base_patch16_224.fb_in1k",
    "deit-b16-distilled": "timm:deit_base_distilled_patch16_224.fb_in1k",
    "resnet50-tv-v1": "timm:resnet50.tv_in1k",
    "resnet50-tv-v2": "timm:resnet50.tv2_in1k",
    "resnet50-a1": "timm:resnet50.a1_in1k",
    "convnext-b": "timm:convnext_base.fb_in1k",
    "mae-vitb16": "timm:vit_base_patch16_224.mae",
    "resnetv2-50x1-bit-in21k": "timm:resnetv2_50x1_bit.goog_in21k",
    "resnetv2-50x1-bit-in21k-ft-in1k": "timm:resnetv2_50x1_bit.goog_in21k_ft_in1k",
}

# The model of each configuration that only a hub has.
OF_A_HUB = {"bioclip": "ViT-B-16", "bioclip-2": "ViT-L-14"}


def entries() -> dict[str, BackboneSpec]:
    """All built-in backbones that are not embedded."""
    registry = Registry((Origin("built-in", paths.CONTENT, trusted=True),))
    specs = {name: registry.backbone(name) for name in registry.backbones}
    return {name: spec for name, spec in specs.items() if not spec.embedded}


ENTRIES = entries()


def upstream(name: str) -> tuple[str, str]:
    """(library, what it calls the model and its weights)."""
    library, _, what = UPSTREAM[name].partition(":")
    return library, what


def model_of(spec: BackboneSpec, folder: Path, *, values: bool) -> SteppedModel:
    """The model of an entry, without its weights.

    values: random ones; else whatever is in memory, for what does not depend on them, in a tenth
    of the time. folder: where a configuration is written that only a hub has.
    """
    if spec.name in OF_A_HUB:
        config = {"model_cfg": open_clip.get_model_config(OF_A_HUB[spec.name])}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        spec = replace(spec, model="local-dir:.", path=str(folder / "entry.toml"))
    if values:
        return stepped(build_module(spec), spec)  # type: ignore[arg-type]
    with _Uninitialised():
        return stepped(build_module(spec), spec)  # type: ignore[arg-type]


def shapes_only() -> FakeTensorMode:
    """Within it a forward pass computes nothing but shapes."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class _Uninitialised(TorchDispatchMode):
    """Leaves out the drawing of random numbers, which is most of the time of building a model."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawing = torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default
        if func in (*drawing, torch.ops.aten.erfinv_.default):
            return args[0]
        return func(*args, **(kwargs or {}))
