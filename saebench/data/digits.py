"""`digits`: 1,797 scanned handwritten digits that ship with scikit-learn, as 32x32 RGB images.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI (1998), test part;
`sklearn.datasets.load_digits`, 8x8 pixels of 0..16. Each is scaled to 0..255, enlarged bicubically
to 32x32 and repeated over three channels, so that patches of 4x4 pixels are pixels of the scan.

An image's id is `digits/<its row in load_digits>`. The first 360 of the class-stratified order of
all rows (`saebench.data.manifest`) are the test split, the next 180 val, the other 1,257 train.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from saebench.data.dataset import Dataset
from saebench.data.manifest import Manifest, stratified_order
from saebench.specs import DatasetSpec

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 32
_ENDS = {"test": (0, 360), "val": (360, 540), "train": (540, 1797)}


class Digits(Dataset):
    """One label level, `digit`, the same as the main label."""

    splits = ("train", "val", "test")
    class_names = NAMES

    def __init__(self, spec: DatasetSpec) -> None:
        super().__init__(spec)
        self.label_names = {"digit": NAMES}

    def _build_manifest(self, split: str) -> Manifest:
        rows = _split_rows(split)
        labels = _scans()[1][rows]
        ids = tuple(_id(row) for row in rows)
        return Manifest(self.spec.name, split, ids, labels, {"digit": labels})

    def _decode(self, split: str, index: int) -> Image.Image:
        scan = _scans()[0][_split_rows(split)[index]]
        grey = np.rint(scan * (255 / 16)).astype(np.uint8)
        large = Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return large.convert("RGB")


def _id(row: int) -> str:
    return f"digits/{row:04d}"


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """(images [1797 8 8] float64 in 0..16, labels [1797] int64)."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return bunch.images, bunch.target.astype(np.int64)


@cache
def _split_rows(split: str) -> np.ndarray:
    """Rows of load_digits in the split, ascending."""
    labels = _scans()[1]
    order = stratified_order("digits", tuple(_id(row) for row in range(len(labels))), labels)
    first, end = _ENDS[split]
    return np.sort(order[first:end])
