"""The pixel pipeline of a backbone: PIL image -> float32 tensor [3 h w].

Convert to RGB; resize; centre crop; scale to 0..1; (x - mean) / std. Resizing is done on PIL images
by torchvision, with antialiasing, as timm and open_clip do: a test holds the pixels to be theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pixels

from saebench.errors import Mismatch
from saebench.specs import InputSpec

_INTERPOLATION = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
    "nearest": InterpolationMode.NEAREST,
}


@dataclass(frozen=True)
class Transform:
    """Callable on a PIL image. Picklable, so that worker processes can decode and transform."""

    input: InputSpec

    def __call__(self, image: Image) -> torch.Tensor:
        """[3 size size] float32. Errors: Mismatch where the pipeline does not end at that size."""
        spec = self.input
        picture: Any = image.convert("RGB")  # torchvision's annotations know of tensors only
        if spec.resize != "none":
            to = spec.resize_to or spec.size
            # An int means the shortest side, a pair both sides.
            size = [to, to] if spec.resize == "squash" else [to]
            picture = pixels.resize(picture, size, _INTERPOLATION[spec.interpolation])
        if spec.crop:
            picture = pixels.center_crop(picture, [spec.size, spec.size])
        if picture.size != (spec.size, spec.size):
            raise Mismatch(
                f"an image comes out of the pixel pipeline as {picture.width}x{picture.height}, "
                f"and [input] says size = {spec.size}",
                'set crop = true, or resize = "squash" without another resize_to',
            )
        return pixels.normalize(pixels.to_tensor(picture), list(spec.mean), list(spec.std))
