"""Training pixels and their augmentation, as batches of tensors.

Pixels are normalised as every embedded backbone expects them: (x / 255 - 0.5) / 0.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from saebench.data import Dataset, open_dataset
from saebench.paths import CONTENT
from saebench.specs import DatasetSpec
from saebench.strict import read_spec

DATASETS = ("digits", "shapes")


@cache
def dataset(name: str) -> Dataset:
    """An embedded dataset by its registry name."""
    return open_dataset(read_spec(DatasetSpec, CONTENT / f"registry/datasets/{name}.toml", name))


@dataclass(frozen=True, eq=False)
class Split:
    """images_n3hw float32, normalised; labels_n int64, the main label of that dataset."""

    images_n3hw: torch.Tensor
    labels_n: torch.Tensor


@cache
def split(name: str, part: str) -> Split:
    """All images of one split."""
    data = dataset(name)
    labels = data.manifest(part).labels
    pixels = np.stack([np.asarray(data.image(part, i)) for i in range(len(labels))])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
    return Split(images.contiguous(), torch.from_numpy(labels))


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Several datasets in one list. shapes_n: is it of shapes; labels_n: each dataset's own."""

    images_n3hw: torch.Tensor
    labels_n: torch.Tensor
    shapes_n: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels_n)


def training_set(names: tuple[str, ...] = DATASETS) -> TrainingSet:
    """The train splits of the named datasets."""
    parts = [split(name, "train") for name in names]
    return TrainingSet(
        torch.cat([part.images_n3hw for part in parts]),
        torch.cat([part.labels_n for part in parts]),
        torch.cat(
            [torch.full_like(p.labels_n, n == "shapes") for n, p in zip(names, parts, strict=True)]
        ).bool(),
    )


@dataclass(frozen=True)
class Augmentation:
    """How far an image is moved. Hues are kept: colour is part of a species.

    Digits turn by up to `digit_turn` and are never mirrored; shapes turn by `shape_turn`. Zoom is
    drawn from `zoom` (below 1 looks at a part of the image), shifts are in half-images, light and
    contrast are factors, noise is a standard deviation in normalised units.
    """

    zoom: tuple[float, float] = (0.85, 1.15)
    shift: float = 0.15
    digit_turn: float = 12 / 360
    shape_turn: float = 0.5
    light: float = 0.25
    contrast: float = 0.25
    noise: float = 0.05

    def __call__(
        self, images_b3hw: torch.Tensor, shapes_b: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """[b 3 h w] -> [b 3 h w]."""
        b = len(images_b3hw)

        def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
            return low + (high - low) * torch.rand(b, *shape, generator=generator)

        largest = torch.where(shapes_b, self.shape_turn, self.digit_turn)
        turn = largest * uniform(-1, 1) * 2 * math.pi
        mirror = torch.where(shapes_b & (uniform(0, 1) < 0.5), -1.0, 1.0)
        zoom = uniform(*self.zoom)
        cos, sin = zoom * turn.cos(), zoom * turn.sin()
        shift = uniform(-self.shift, self.shift, 2)
        affine = torch.stack([cos * mirror, -sin, shift[:, 0], sin * mirror, cos, shift[:, 1]], 1)
        grid = F.affine_grid(affine.view(b, 2, 3), list(images_b3hw.shape), align_corners=False)
        moved = F.grid_sample(
            images_b3hw, grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )

        light = uniform(1 - self.light, 1 + self.light, 1, 1, 1)
        contrast = uniform(1 - self.contrast, 1 + self.contrast, 1, 1, 1)
        mean = moved.mean(dim=(1, 2, 3), keepdim=True)
        lit = ((moved - mean) * contrast + mean + 1) * light - 1
        return lit + self.noise * torch.randn(lit.shape, generator=generator)
