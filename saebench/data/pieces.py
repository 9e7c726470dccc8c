"""Pieces of batches: what a worker process decodes at a time, and the memory they come through.

Where processes are forked, pieces come through one ring of memory that is shared from the start.
torch's own way makes and maps a file in /dev/shm for each: a quarter more CPU time an image, and
containers have little of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from mmap import mmap
from multiprocessing import get_start_method
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import get_worker_info

from saebench.data.dataset import Dataset
from saebench.errors import DataError, ImageError, SaebenchError, is_out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], torch.Tensor]
PIECE = 16  # images that a worker decodes at a time


class Cut(NamedTuple):
    """A piece of a batch: positions[start:stop] of its part."""

    start: int
    stop: int
    last: bool  # of its batch
    batch: int  # images of the batch, if all of them are good


def cuts_of(n: int, batch_size: int, piece: int) -> list[Cut]:
    found = []
    for start in range(0, n, batch_size):
        stop = min(start + batch_size, n)
        edges = [*range(start, stop, piece), stop]
        found += [Cut(a, b, b == stop, stop - start) for a, b in pairwise(edges)]
    return found


class Piece(NamedTuple):
    rows: np.ndarray  # of the images that are good
    images: torch.Tensor | None  # [good 3 h w]; None: there are none, or they are in the ring
    in_ring: bool
    bad: list[tuple[int, str]]  # row, why


class Pieces(TorchDataset):
    """Item j: the j-th piece, or the error that was met in it.

    ring: [m PIECE 3 h w], memory that all processes share. Piece j is written to its place j mod m,
    where m - 1 pieces at most are ahead of the one that is read.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        rows: list[np.ndarray],
        transform: Transform,
        skip: bool,
    ) -> None:
        self.dataset, self.split, self.rows = dataset, split, rows
        self.transform, self.skip = transform, skip
        self.ring: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Piece | SaebenchError:
        # Errors are handed over as values: torch would rewrite what is raised in a worker.
        try:
            return self._piece(number)
        except SaebenchError as error:
            return error

    def _piece(self, number: int) -> Piece:
        tensors, good, bad = [], [], []
        for row in self.rows[number].tolist():
            try:
                tensors.append(self.tensor(row))
                good.append(row)
            except ImageError as error:
                if not self.skip:
                    raise
                bad.append((row, error.what))
        if shapes := {tensor.shape for tensor in tensors}:
            one, *others = sorted(shapes)
            if others:
                raise uneven(one, others[0])
        rows = np.asarray(good, dtype=np.int64)
        if self.ring is not None and all(
            tensor.shape == self.ring.shape[2:] and tensor.dtype == self.ring.dtype
            for tensor in tensors
        ):
            place = self.ring[number % len(self.ring)]
            for i, tensor in enumerate(tensors):
                place[i] = tensor
            return Piece(rows, None, bool(tensors), bad)
        return Piece(rows, torch.stack(tensors) if tensors else None, False, bad)

    def tensor(self, row: int) -> torch.Tensor:
        """One image, transformed.

        Errors: DataError, ImageError; SaebenchError where a worker has no memory left.
        """
        try:
            return self._transformed(self.dataset.image(self.split, row), row)
        except Exception as error:
            # In the main process smaller batches may help, which whoever asks for them knows.
            if not is_out_of_memory(error) or get_worker_info() is None:
                raise
            raise SaebenchError(
                f"memory ran out in a process that decodes images, at {self._name(row)}"
                + (f": {error}" if str(error) else ""),
                "use fewer processes, with  --workers 2  or  --workers 0",
            ) from error

    def _transformed(self, image: Image, row: int) -> torch.Tensor:
        try:
            return self.transform(image)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise DataError(
                f"{self._name(row)}, {image.width} x {image.height} pixels, fails in the "
                f"backbone's input pipeline: {error}",
                "check the [input] of the backbone's entry",
            ) from error

    def _name(self, row: int) -> str:
        id = self.dataset.manifest(self.split).ids[row]
        return f"image '{id}' of dataset '{self.dataset.spec.name}'"


def ring_for(items: Pieces, places: int) -> torch.Tensor | None:
    """Shared memory for as many pieces; None where processes cannot inherit it.

    Its shape is that of the first image, which is decoded for it. Where that one is bad, pieces
    take torch's way.
    """
    if not len(items) or not sys.platform.startswith("linux") or get_start_method() != "fork":
        return None
    try:
        first = items.tensor(int(items.rows[0][0]))
    except SaebenchError:
        return None  # it is met again at its place
    numbers = places * PIECE * first.numel()
    memory = mmap(-1, numbers * first.element_size())  # is freed with the last tensor on it
    ring = torch.frombuffer(memory, dtype=first.dtype, count=numbers)
    return ring.view(places, PIECE, *first.shape)


def uneven(one: Sequence[int], other: Sequence[int]) -> DataError:
    return DataError(
        f"the backbone's input pipeline gives tensors of shape {list(one)} for some images and "
        f"{list(other)} for others, which are no batch",
        'its entry has to crop or squash: resize = "squash", or crop = true',
    )
