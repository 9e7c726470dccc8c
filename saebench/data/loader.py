"""Rows of a dataset as batches of tensors, cut at fixed places.

Batch j holds positions[j*size : (j+1)*size], whatever the number of worker processes: workers only
decode ahead. Batches come back in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from saebench.data.dataset import Dataset
from saebench.errors import DataError, SaebenchError

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], torch.Tensor]
PREFETCH = 4  # batches decoded ahead by each worker process


def batches(
    dataset: Dataset,
    split: str,
    positions: np.ndarray,
    transform: Transform,
    batch_size: int,
    workers: int = 0,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield (positions_b, images_b3hw float32) for successive slices of `positions`.

    positions: [n] int64 rows of the split's manifest. transform: PIL image -> [3 h w].
    Errors: DataError naming the first image that cannot be decoded, raised at its batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}")
    cuts = _Cuts(dataset, split, np.asarray(positions), transform, batch_size)
    # A private generator: a DataLoader draws a seed, by default from torch's global generator.
    loader: Any = DataLoader(
        cuts,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        generator=torch.Generator(),
    )
    for first, images in loader:
        if isinstance(images, SaebenchError):
            raise images
        yield cuts.positions[first : first + batch_size], images


class _Cuts(TorchDataset):
    """Item j is the j-th batch: (its first place in `positions`, its images or the error met)."""

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        positions: np.ndarray,
        transform: Transform,
        batch_size: int,
    ) -> None:
        self.dataset, self.split, self.positions = dataset, split, positions
        self.transform, self.batch_size = transform, batch_size

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __getitem__(self, cut: int) -> tuple[int, torch.Tensor | SaebenchError]:
        first = cut * self.batch_size
        rows = self.positions[first : first + self.batch_size]
        # An error is handed over as a value: raised in a worker, torch would rewrite its message.
        try:
            return first, torch.stack([self._tensor(int(row)) for row in rows])
        except SaebenchError as error:
            return first, error

    def _tensor(self, row: int) -> torch.Tensor:
        try:
            return self.transform(self.dataset.image(self.split, row))
        except SaebenchError:
            raise
        except Exception as error:
            name = self.dataset.manifest(self.split).ids[row]
            raise DataError(
                f"image '{name}' of dataset '{self.dataset.spec.name}' cannot be decoded: {error}",
                "replace the file, or leave the image out of the manifest",
            ) from error
