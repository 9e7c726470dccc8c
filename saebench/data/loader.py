"""Rows of a dataset as batches of tensors, cut at fixed places.

Batch j holds positions[j*size : (j+1)*size], whatever the number of worker processes: workers only
decode ahead. Batches come back in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from saebench.data.dataset import Dataset, undecodable
from saebench.errors import ImageError, SaebenchError

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], torch.Tensor]
PREFETCH = 4  # batches decoded ahead by each worker process


def choose_workers(dataset: Dataset, device: torch.device) -> int:
    """How many processes decode, where nobody says: none for what is drawn or held in memory."""
    return 0


def batches(
    dataset: Dataset,
    split: str,
    positions: np.ndarray,
    transform: Transform,
    batch_size: int,
    workers: int = 0,
    *,
    bad_images: Literal["fail", "skip"] = "fail",
    on_bad: Callable[[int, str], None] = lambda row, why: None,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield (positions_b, images_b3hw float32) for successive slices of `positions`.

    positions: [n] int64 rows of the split's manifest. transform: PIL image -> [3 h w].
    bad_images: "skip" leaves out what cannot be decoded, and tells `on_bad` of it (row of the
    manifest, why); a batch of which nothing is left is not yielded.
    Errors: DataError naming the first image that cannot be decoded, raised at its batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}")
    cuts = _Cuts(dataset, split, np.asarray(positions), transform, batch_size, bad_images)
    # A private generator: a DataLoader draws a seed, by default from torch's global generator.
    loader: Any = DataLoader(
        cuts,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        generator=torch.Generator(),
    )
    for rows, images, bad in loader:
        if isinstance(images, SaebenchError):
            raise images
        for row, why in bad:
            on_bad(row, why)
        if images is not None:
            yield rows, images


class _Cuts(TorchDataset):
    """Item j is the j-th batch: (its rows, its images or the error met, [(row, why it is bad)])."""

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        positions: np.ndarray,
        transform: Transform,
        batch_size: int,
        bad_images: str,
    ) -> None:
        self.dataset, self.split, self.positions = dataset, split, positions
        self.transform, self.batch_size, self.bad_images = transform, batch_size, bad_images

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __getitem__(
        self, cut: int
    ) -> tuple[np.ndarray, torch.Tensor | SaebenchError | None, list[tuple[int, str]]]:
        rows = self.positions[cut * self.batch_size : (cut + 1) * self.batch_size]
        tensors, good, bad = [], [], []
        for row in rows.tolist():
            try:
                tensors.append(self._tensor(row))
                good.append(row)
            except ImageError as error:
                if self.bad_images != "skip":
                    # Handed over as a value: raised in a worker, torch would rewrite its message.
                    return rows, error, []
                bad.append((row, error.what))
            except SaebenchError as error:
                return rows, error, []
        images = torch.stack(tensors) if tensors else None
        return np.asarray(good, dtype=np.int64), images, bad

    def _tensor(self, row: int) -> torch.Tensor:
        try:
            return self.transform(self.dataset.image(self.split, row))
        except (SaebenchError, MemoryError):
            raise
        except Exception as error:  # in the transform
            name = self.dataset.manifest(self.split).ids[row]
            raise undecodable(name, self.dataset.spec.name, error) from error
