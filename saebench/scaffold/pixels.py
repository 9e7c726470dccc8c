"""A library's own pixel pipeline as the [input] of an entry.

timm       resize to floor(size / crop_pct), centre crop to size
open_clip  resize to size, centre crop (`shortest`); or both sides to size (`squash`)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from saebench.errors import SpecError
from saebench.specs import InputSpec

_INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


def timm_pixels(config: Mapping[str, Any], who: str) -> InputSpec:
    """Of a pretrained configuration, as `timm.data.create_transform` would have it.

    Errors: SpecError for what [input] cannot say.
    """
    from timm.data.config import resolve_data_config

    found = resolve_data_config({}, pretrained_cfg=dict(config))
    _, height, width = found["input_size"]
    resize = {"center": "shortest", "squash": "squash"}.get(found["crop_mode"])
    to = math.floor(height / found["crop_pct"])
    return _spec(
        who,
        size=(height, width),
        resize=resize,
        resize_to=None if to == height else to,
        crop=resize == "shortest" or to != height,
        interpolation=found["interpolation"],
        mean=found["mean"],
        std=found["std"],
    )


def open_clip_pixels(model: Mapping[str, Any], tag: Mapping[str, Any], who: str) -> InputSpec:
    """Of a model's configuration and its pretrained tag's, as `open_clip.image_transform` has it.

    Errors: SpecError for what [input] cannot say.
    """
    from open_clip.transform import PreprocessCfg

    found = {**asdict(PreprocessCfg()), **tag}
    size = model["vision_cfg"].get("image_size", 224)
    resize = found["resize_mode"] if found["resize_mode"] in ("shortest", "squash") else None
    return _spec(
        who,
        size=(size, size) if isinstance(size, int) else tuple(size),
        resize=resize,
        crop=resize == "shortest",
        interpolation=found["interpolation"],
        mean=found["mean"],
        std=found["std"],
    )


def _spec(who: str, *, size: tuple[int, int], resize: Any, **rest: Any) -> InputSpec:
    if size[0] != size[1] or resize is None or rest["interpolation"] not in _INTERPOLATIONS:
        raise SpecError(
            f"{who}: its pixels ({size[0]}x{size[1]}, {rest['interpolation']}) are not squares "
            "that are cropped or squashed, bicubic, bilinear or nearest",
            "write the entry by hand, and a loader that returns a Backbone with its own transform",
        )
    rest["mean"], rest["std"] = tuple(rest["mean"]), tuple(rest["std"])
    return InputSpec(size=size[0], resize=resize, **rest)
