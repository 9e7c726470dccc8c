"""timm's Eva: DINOv3, EVA02, and other vision transformers with rotary position embedding.

patch_embed | class and register tokens, position embedding, pos_drop | norm_pre | blocks.i … | norm
| pool | fc_norm, head_drop | head

Every block rotates its queries and keys by the position of each patch, read from tables. At one
image size these tables are constants of the model, so they are no part of what a bottleneck hands
on: the blocks look them up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from saebench.backbones.architectures.last_block import eva_short
from saebench.backbones.architectures.parts import one
from saebench.backbones.architectures.vit import (
    grid_of,
    natural_sites,
    patches,
    pooling,
    reads_cls,
    sequence,
)
from saebench.backbones.steps import Output, Step, SteppedModel


def eva(model: Eva, size: int | None) -> SteppedModel:
    """`forward_features`, then `forward_head`."""
    embedding = ("pos_drop",) if model.patch_drop is None else ("pos_drop", "patch_drop")
    rotary = Rotary(model, grid_of(model, size))
    *blocks, last = (_block(block, i, rotary) for i, block in enumerate(model.blocks))
    if reads_cls(model, Eva):
        at = len(blocks)
        last = replace(last, short=eva_short(model.blocks[at], lambda: rotary(at)))

    features = (
        one(model, "patch_embed"),
        Step(lambda x: model._pos_embed(x)[0], modules=embedding, ends=embedding),
        one(model, "norm_pre"),
        *blocks,
        last,
        one(model, "norm"),
    )

    def read(x: Tensor) -> Output:
        return Output(x, model.head(x) if model.num_classes > 0 else None)

    return SteppedModel(
        module=model,
        steps=(*features, *pooling(model)),
        read=read,
        reads=("head",),
        n_classes=model.num_classes,
        natural={**natural_sites(model), "pooled": "fc_norm"},
        prefix={
            "cls": int(model.cls_token is not None),
            "registers": 0 if model.reg_token is None else model.reg_token.shape[1],
        },
        sequence=sequence(model, len(features)),
        **patches(model, size),
    )


def _block(block: nn.Module, i: int, rotary: Callable[[int], Tensor | None]) -> Step:
    path = (f"blocks.{i}",)
    return Step(lambda x: block(x, rope=rotary(i)), modules=path, starts=path, ends=path)


class Rotary:
    """Block -> its table of sines and cosines [h·w, 2·d], those of `_pos_embed`, or None.

    Made when first asked for on a device and in a dtype, and kept: `_pos_embed` of a model that
    takes any image size computes them anew in each pass.
    """

    def __init__(self, model: Eva, grid: tuple[int, int]) -> None:
        self._model: Any = model
        self._grid = grid
        self._made: tuple[Any, Tensor | None] = (None, None)

    def __call__(self, block: int) -> Tensor | None:
        where = self._model.patch_embed.proj.weight
        key = (where.device, where.dtype)
        if self._made[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._made = (key, self._model._pos_embed(self._blank(where))[1])
        tables = self._made[1]
        # Learned rotations ("mixed") are each block's own; the others are shared by all.
        return tables[block] if self._model.rope_mixed and tables is not None else tables

    def _blank(self, like: Tensor) -> Tensor:
        """A sequence of patches, in the form that `patch_embed` gives it."""
        if self._model.dynamic_img_size:
            return like.new_zeros(1, *self._grid, len(like))
        return like.new_zeros(1, self._grid[0] * self._grid[1], len(like))
