"""Rows of a dataset as batches of tensors, cut at fixed places.

Batch j holds positions[j*size : (j+1)*size], counted anew from each of `edges`, whatever the number
of worker processes: workers only decode ahead. They work on pieces of a batch, so that the first
batch is soon there and none waits for one slow process, and hand them over in shared memory, in
order. At least two batches are decoded ahead of the one that is asked for.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from saebench.data.dataset import Dataset
from saebench.errors import DataError, ImageError, SaebenchError

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], torch.Tensor]
PIECE = 16  # images that a worker decodes at a time
PREFETCH = 4  # pieces decoded ahead by each worker, at least
MOST = 16  # workers: 16 decode 2,000 photographs a second and more
SHARED = 1 << 27  # bytes of shared memory that a worker may need


def choose_workers(dataset: Dataset, device: torch.device) -> int:
    """How many processes decode, where nobody says.

    None for what is drawn or held in memory. For image files: beside an accelerator, one for each
    CPU this process may use, at most 16 and as many as there is shared memory for; where the CPUs
    compute the backbone too, a quarter of them.
    """
    if not dataset.decodes:
        return 0
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = max(1, cpus // 4) if device.type == "cpu" else cpus
    return min(wanted, MOST, _shared_memory() // SHARED)


def batches(
    dataset: Dataset,
    split: str,
    positions: np.ndarray,
    transform: Transform,
    batch_size: int,
    workers: int = 0,
    *,
    edges: Sequence[int] = (),
    bad_images: Literal["fail", "skip"] = "fail",
    on_bad: Callable[[int, str], None] = lambda row, why: None,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield (positions_b, images_b3hw float32) for successive slices of `positions`.

    positions: [n] int64 rows of the split's manifest. transform: PIL image -> [3 h w].
    edges: places in `positions` where a batch ends in any case.
    bad_images: "skip" leaves out what cannot be decoded, and tells `on_bad` of it (row of the
    manifest, why); a batch of which nothing is left is not yielded.
    Errors: DataError naming the first image that cannot be decoded, raised at its batch;
    SaebenchError for a worker that was killed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}")
    dataset.manifest(split)  # made here once, and not in every worker
    pieces = _Pieces(
        dataset,
        split,
        np.asarray(positions),
        transform,
        _cuts(len(positions), batch_size, edges, PIECE if workers else batch_size),
        bad_images == "skip",
    )
    ahead = max(PREFETCH, -(-2 * batch_size // (PIECE * max(workers, 1))))
    # A private generator: a DataLoader draws a seed, by default from torch's global generator.
    loader: Any = DataLoader(
        pieces,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        generator=torch.Generator(),
    )
    rows_of_batch, images_of_batch = [], []
    for cut, piece in zip(pieces.cuts, _watched(loader), strict=True):
        if isinstance(piece, SaebenchError):
            raise piece
        for row, why in piece.bad:
            on_bad(row, why)
        if piece.images is not None:
            rows_of_batch.append(piece.rows)
            images_of_batch.append(piece.images)
        if cut.last and images_of_batch:
            yield np.concatenate(rows_of_batch), _joined(images_of_batch)
            rows_of_batch, images_of_batch = [], []


class _Cut(NamedTuple):
    """A piece of a batch: positions[start:stop]."""

    start: int
    stop: int
    last: bool  # of its batch


def _cuts(n: int, batch_size: int, edges: Sequence[int], piece: int) -> list[_Cut]:
    found = []
    for first, end in pairwise(sorted({0, n, *(edge for edge in edges if 0 < edge < n)})):
        for start in range(first, end, batch_size):
            stop = min(start + batch_size, end)
            parts = [*range(start, stop, piece), stop]
            found += [_Cut(a, b, b == stop) for a, b in pairwise(parts)]
    return found


class _Piece(NamedTuple):
    rows: np.ndarray  # of the images that are good
    images: torch.Tensor | None  # [good 3 h w]
    bad: list[tuple[int, str]]  # row, why


class _Pieces(TorchDataset):
    """Item j: the j-th piece, or the error that was met in it."""

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        positions: np.ndarray,
        transform: Transform,
        cuts: list[_Cut],
        skip: bool,
    ) -> None:
        self.dataset, self.split, self.positions = dataset, split, positions
        self.transform, self.cuts, self.skip = transform, cuts, skip

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, number: int) -> _Piece | SaebenchError:
        # Errors are handed over as values: torch would rewrite what is raised in a worker.
        try:
            return self._piece(self.positions[self.cuts[number].start : self.cuts[number].stop])
        except SaebenchError as error:
            return error

    def _piece(self, rows: np.ndarray) -> _Piece:
        tensors, good, bad = [], [], []
        for row in rows.tolist():
            try:
                tensors.append(self._tensor(row))
                good.append(row)
            except ImageError as error:
                if not self.skip:
                    raise
                bad.append((row, error.what))
        images = _joined([tensor[None] for tensor in tensors]) if tensors else None
        return _Piece(np.asarray(good, dtype=np.int64), images, bad)

    def _tensor(self, row: int) -> torch.Tensor:
        image = self.dataset.image(self.split, row)
        try:
            return self.transform(image)
        except Exception as error:
            name = self.dataset.manifest(self.split).ids[row]
            raise DataError(
                f"image '{name}' of dataset '{self.dataset.spec.name}', {image.width} x "
                f"{image.height} pixels, fails in the backbone's input pipeline: {error}",
                "check the [input] of the backbone's entry",
            ) from error


def _joined(images: list[torch.Tensor]) -> torch.Tensor:
    shapes = sorted({tuple(part.shape[1:]) for part in images})
    if len(shapes) > 1:
        raise DataError(
            f"the backbone's input pipeline gives tensors of shape {list(shapes[0])} for some "
            f"images and {list(shapes[1])} for others, which are no batch",
            'its entry has to crop or squash: resize = "squash", or crop = true',
        )
    return images[0] if len(images) == 1 else torch.cat(images)


def _watched(loader: Any) -> Iterator[_Piece | SaebenchError]:
    """The loader's items. A worker that dies is an error here, and nowhere else."""
    with _own_signals():
        items = iter(loader)
    while True:
        try:
            piece = next(items)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # What a dead worker had decoded ahead cannot be fetched from it any more.
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise SaebenchError(
                f"a process that decodes images was killed ({error or 'it is gone'})",
                "memory ran out, or shared memory (/dev/shm; docker's --shm-size): use fewer, with "
                " --workers 2  or  --workers 0",
            ) from None
        yield piece


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep torch from raising a worker's death wherever the main thread is at that moment.

    It sets a handler of SIGCHLD for that, so that the error would come up in a task that has
    nothing to do with it. The loader finds out by itself, five seconds into waiting for an item.
    """
    here = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.getsignal(signal.SIGCHLD) if here else None
    try:
        yield
    finally:
        if here and before is not None:
            signal.signal(signal.SIGCHLD, before)


def _shared_memory() -> int:
    """Bytes of shared memory that are free; without a limit where nobody says."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 1 << 62
