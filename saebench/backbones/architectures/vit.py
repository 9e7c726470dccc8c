"""timm's VisionTransformer: ViT, CLIP, SigLIP, DINO, DINOv2 (with or without registers), MAE, DeiT.

patch_embed | position embedding, pos_drop | norm_pre | blocks.i … | norm | pool
| fc_norm, head_drop | head

DeiT with a distillation token: … | norm | both heads, averaged.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from saebench.backbones.architectures.last_block import NORMS, Short, vit_short
from saebench.backbones.architectures.parts import each, one, pair, runs_as
from saebench.backbones.steps import Output, Step, SteppedModel


def vision_transformer(model: VisionTransformer, size: int | None) -> SteppedModel:
    """`forward_features`, then `forward_head`."""

    def read(x: Tensor) -> Output:
        return Output(x, model.head(x) if model.num_classes > 0 else None)

    short = vit_short(model.blocks[-1]) if reads_cls(model, VisionTransformer) else None
    features = _features(model, short)
    return SteppedModel(
        module=model,
        steps=(*features, *pooling(model)),
        read=read,
        reads=("head",),
        n_classes=model.num_classes,
        natural={**natural_sites(model), "pooled": "fc_norm"},
        prefix={"cls": int(model.cls_token is not None), "registers": model.num_reg_tokens},
        sequence=sequence(model, len(features)),
        **patches(model, size),
    )


def distilled(model: VisionTransformerDistilled, size: int | None) -> SteppedModel:
    """DeiT with a distillation token: the two heads read two tokens, and their means are taken."""

    def read(x: Tensor) -> Output:
        embedding = model.forward_head(x, pre_logits=True)
        return Output(embedding, model.forward_head(x) if model.num_classes > 0 else None)

    features = _features(model)
    return SteppedModel(
        module=model,
        steps=features,
        read=read,
        n_classes=model.num_classes,
        natural=natural_sites(model),
        prefix={"cls": 1, "distillation": 1},
        sequence=sequence(model, len(features)),
        **patches(model, size),
    )


def _features(model: VisionTransformer, short: Short | None = None) -> tuple[Step, ...]:
    """`forward_features`: images -> the normed sequence [b t d]. short: of the last block."""

    def embed(x: Tensor) -> Tensor:
        return model.patch_drop(model._pos_embed(x))

    embedding = ("pos_drop", "patch_drop")
    *blocks, last = each(model, "blocks")
    return (
        one(model, "patch_embed"),
        Step(embed, modules=embedding, ends=embedding),
        one(model, "norm_pre"),
        *blocks,
        replace(last, short=short),
        one(model, "norm"),
    )


def pooling(model: Any) -> tuple[Step, Step]:
    """`forward_head` up to the classifier: the sequence [b t d] -> [b d]."""
    pool = () if model.attn_pool is None else ("attn_pool",)
    fc_norm = ("fc_norm",)
    return (
        Step(model.pool, modules=pool, ends=pool),
        Step(
            lambda x: model.head_drop(model.fc_norm(x)),
            modules=fc_norm,
            starts=fc_norm,
            ends=(*fc_norm, "head_drop"),
        ),
    )


def reads_cls(model: Any, known: type[nn.Module]) -> bool:
    """Whether all that comes after the blocks is, as in the class `known`, of CLS, the first."""
    return (
        runs_as(model, known, "pool")
        and (model.global_pool == "token" and model.attn_pool is None)
        and model.cls_token is not None
        and isinstance(model.norm, NORMS)
    )


def sequence(model: Any, boundary: int) -> int | None:
    """The boundary after the final norm; None where that comes after pooling (`fc_norm`)."""
    return None if isinstance(model.norm, nn.Identity) else boundary


def natural_sites(model: Any) -> dict[str, str]:
    """The residual stream after each block, and after the final norm where there is one."""
    sites = {f"blocks.{i}": f"blocks.{i}" for i in range(len(model.blocks))}
    return sites if isinstance(model.norm, nn.Identity) else {**sites, "norm": "norm"}


def patches(model: Any, size: int | None) -> dict[str, Any]:
    """The grid of patches [h w], and what images the model takes."""
    grid = grid_of(model, size)
    if not model.dynamic_img_size:
        return {"grid": grid, "image_size": pair(model.patch_embed.img_size)}
    whole = 1 if model.patch_embed.dynamic_img_pad else math.lcm(*model.patch_embed.patch_size)
    return {"grid": grid, "multiple": whole}


def grid_of(model: Any, size: int | None) -> tuple[int, int]:
    """Patches [h w]: of images of `size` where the model takes any, else of the one it takes."""
    embed = model.patch_embed
    if size is None or not model.dynamic_img_size:
        return pair(embed.grid_size)
    return pair(embed.dynamic_feat_size((size, size)))
