"""The pixel pipeline gives timm's and open_clip's own pixels."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data.transforms_factory import create_transform

from saebench.backbones.pixels import Transform
from saebench.errors import Mismatch
from saebench.specs import InputSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(57, 91), (91, 57), (64, 64), (300, 40), (40, 300), (16, 16)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    rgb = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(rgb).convert(mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("crop_pct", "resize_to"), [(1.0, None), (0.9, 35), (0.875, 36)])
@pytest.mark.parametrize(("crop_mode", "resize"), [("center", "shortest"), ("squash", "squash")])
def test_equals_timm(
    size: tuple[int, int],
    interpolation: Any,
    crop_pct: float,
    resize_to: int | None,
    crop_mode: str,
    resize: Any,
) -> None:
    theirs: Any = create_transform(
        (3, 32, 32),
        interpolation=interpolation,
        mean=MEAN,
        std=STD,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
    spec = InputSpec(
        size=32,
        resize=resize,
        resize_to=resize_to,
        interpolation=interpolation,
        mean=MEAN,
        std=STD,
    )
    image = picture(*size)
    assert torch.equal(Transform(spec)(image), theirs(image))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_equals_open_clip(
    size: tuple[int, int], interpolation: Any, resize: Any, mode: str
) -> None:
    config = PreprocessCfg(
        size=32, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=resize
    )
    theirs: Any = image_transform_v2(config, is_train=False)
    crop = resize == "shortest"
    spec = InputSpec(
        size=32, resize=resize, crop=crop, interpolation=interpolation, mean=MEAN, std=STD
    )
    image = picture(*size, mode=mode)
    assert torch.equal(Transform(spec)(image), theirs(image))


def test_without_resizing_pixels_are_scaled_alone() -> None:
    image = picture(8, 8)
    spec = InputSpec(size=8, resize="none", crop=False, mean=MEAN, std=STD)
    wanted = (np.asarray(image, dtype=np.float64) / 255 - MEAN) / STD
    found = Transform(spec)(image)
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), wanted.transpose(2, 0, 1), atol=1e-6)


def test_nearest_repeats_pixels() -> None:
    image = picture(4, 4)
    spec = InputSpec(size=8, resize="squash", interpolation="nearest", mean=(0, 0, 0), std=(1,) * 3)
    wanted = np.asarray(image).repeat(2, axis=0).repeat(2, axis=1) / 255
    assert np.allclose(Transform(spec)(image).numpy(), wanted.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "LA", "1", "I"])
def test_every_mode_becomes_rgb_first(mode: str) -> None:
    image = picture(40, 50, mode=mode)
    spec = InputSpec(size=32)
    assert torch.equal(Transform(spec)(image), Transform(spec)(image.convert("RGB")))


def test_shortest_and_squash_differ_on_an_image_that_is_not_square() -> None:
    image = picture(57, 91)
    shortest = Transform(InputSpec(size=32, resize="shortest"))(image)
    squash = Transform(InputSpec(size=32, resize="squash"))(image)
    assert not torch.equal(shortest, squash)


def test_a_pipeline_that_ends_at_another_size_says_so() -> None:
    transform = Transform(InputSpec(size=32, resize="shortest", crop=False))
    assert transform(picture(40, 40)).shape == (3, 32, 32)
    with pytest.raises(Mismatch, match="comes out of the pixel pipeline as 64x32"):
        transform(picture(80, 40))


def test_it_can_be_sent_to_worker_processes() -> None:
    transform = Transform(InputSpec(size=32))
    image = picture(57, 91)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))
