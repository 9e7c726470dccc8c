"""What timm and open_clip resample while they convert a checkpoint, made visible.

A position embedding [tokens d] that was trained on another grid is resampled to the model's
(bicubic, over the patches alone), as the libraries do and as DINOv2's makers do: it is allowed, and
noted. A patch embedding [d 3 h w] of another patch size is another model: it is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from saebench.errors import WeightsError

_IMAGE, _TEXT = "visual.positional_embedding", "positional_embedding"  # open_clip's names


@contextmanager
def watched(path: Path) -> Iterator[list[str]]:
    """While timm converts the checkpoint at `path`: notes on the position embeddings it resamples.

    timm's converters call two functions for this, which each file of models has imported under its
    own name; what they were given is not returned, and only logged in part.
    Errors: WeightsError from within, for a patch embedding of another patch size.
    """
    from timm.layers.patch_embed import resample_patch_embed
    from timm.layers.pos_embed import resample_abs_pos_embed

    notes: list[str] = []

    def position(stored: Tensor, new_size: Any, old_size: Any = None, *rest: Any, **more: Any):
        n_prefix = rest[0] if rest else more.get("num_prefix_tokens", 1)
        old = tuple(old_size or (isqrt(stored.shape[1] - n_prefix),) * 2)
        if old != tuple(new_size):
            notes.append(position_note(_grid(*old), _grid(*new_size)))
        return resample_abs_pos_embed(stored, new_size, old_size, *rest, **more)

    def patch(stored: Tensor, new_size: Any, *_: Any, **__: Any) -> Tensor:
        raise WeightsError(
            f"{path} does not fit the model: its patch embedding is {list(stored.shape)}, and the "
            f"model's {[*stored.shape[:2], *new_size]}",
            f"its patches are {_grid(*stored.shape[-2:])} pixels: take the model of this patch "
            f"size, or model_args.patch_size = {stored.shape[-1]}",
        )

    with _replaced({resample_abs_pos_embed: position, resample_patch_embed: patch}):
        yield notes


@contextmanager
def _replaced(functions: Mapping[Callable[..., Any], Callable[..., Any]]) -> Iterator[None]:
    """Others in the place of some functions, in all of timm's files of models."""
    held = [
        (vars(module), own, function)
        for name, module in list(sys.modules.items())
        if name.startswith("timm.models.")
        for function in functions
        if vars(module).get(own := function.__name__) is function
    ]
    for names, own, function in held:
        names[own] = functions[function]
    try:
        yield
    finally:
        for names, own, function in held:
            names[own] = function


def open_clip_notes(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Notes on the position embeddings that open_clip resamples: those of another length.

    stored, own: the file's tensors under the model's names, before; and the model's.
    """
    notes = []
    if (lengths := _lengths(_IMAGE, stored, own)) and lengths[0] != lengths[1]:
        sides = [isqrt(n - 1) for n in lengths]  # after the class token a square
        notes.append(position_note(*(_grid(side, side) for side in sides)))
    for name in (_TEXT, f"text.{_TEXT}"):
        if (lengths := _lengths(name, stored, own)) and lengths[0] != lengths[1]:
            notes.append(f"text {position_note(*map(str, lengths))} tokens")
    return notes


def position_note(old: str, new: str) -> str:
    """How a resampled position embedding is spoken of."""
    return f"position embedding resampled from {old} to {new}"


def _lengths(name: str, *parts: Mapping[str, Tensor]) -> list[int]:
    return [len(part[name]) for part in parts] if all(name in part for part in parts) else []


def _grid(height: int, width: int) -> str:
    return f"{height} x {width}"
