"""The pixel pipelines of full-size backbones on real photographs (skipped without them)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data.transforms_factory import create_transform

from saebench.backbones.pixels import Transform
from saebench.specs import InputSpec

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
N_PHOTOS = 12


@pytest.fixture
def photos(real_data: Path) -> list[Image.Image]:
    files = sorted((real_data / "photos").glob("*.jpg"))[:N_PHOTOS]
    assert len(files) == N_PHOTOS
    return [Image.open(file) for file in files]


@pytest.mark.parametrize(("crop_pct", "resize_to"), [(0.9, 248), (0.95, 235), (1.0, 224)])
def test_timm_on_photographs(photos: list[Image.Image], crop_pct: float, resize_to: int) -> None:
    theirs: Any = create_transform(
        (3, 224, 224), interpolation="bicubic", crop_pct=crop_pct, **IMAGENET
    )
    ours = Transform(InputSpec(size=224, resize_to=resize_to, **IMAGENET))
    for photo in photos:
        assert torch.equal(ours(photo), theirs(photo.convert("RGB")))


def test_open_clip_on_photographs(photos: list[Image.Image]) -> None:
    config = PreprocessCfg(size=224, interpolation="bicubic", resize_mode="shortest", **IMAGENET)
    theirs: Any = image_transform_v2(config, is_train=False)
    ours = Transform(InputSpec(size=224, **IMAGENET))
    for photo in photos:
        assert torch.equal(ours(photo), theirs(photo))
