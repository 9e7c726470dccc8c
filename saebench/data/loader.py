"""Rows of a dataset as batches of tensors, cut at fixed places.

Batch j holds positions[j*size : (j+1)*size], whatever the number of worker processes: workers only
decode ahead. They work on pieces of a batch, so that the first batch is soon there and none waits
for one slow process, and hand them over in shared memory, in order. At least two batches are
decoded ahead of the one that is asked for, those of the next part among them (`parts`).
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
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
Batch = tuple[np.ndarray, torch.Tensor]  # rows of the manifest [b], images [b 3 h w]
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
    bad_images: Literal["fail", "skip"] = "fail",
    on_bad: Callable[[int, str], None] = lambda row, why: None,
) -> Iterator[Batch]:
    """Yield (positions_b, images_b3hw float32) for successive slices of `positions`.

    positions: [n] int64 rows of the split's manifest. transform: PIL image -> [3 h w].
    bad_images: "skip" leaves out what cannot be decoded, and tells `on_bad` of it (row of the
    manifest, why); a batch of which nothing is left is not yielded.
    Errors: DataError naming the first image that cannot be decoded, raised at its batch;
    SaebenchError for a worker that was killed.
    """
    only = parts(
        dataset,
        split,
        [np.asarray(positions)],
        transform,
        batch_size,
        workers,
        bad_images=bad_images,
        on_bad=on_bad,
    )
    return next(only)


def parts(
    dataset: Dataset,
    split: str,
    positions: Sequence[np.ndarray],
    transform: Transform,
    batch_size: int,
    workers: int = 0,
    *,
    bad_images: Literal["fail", "skip"] = "fail",
    on_bad: Callable[[int, str], None] = lambda row, why: None,
) -> Iterator[Iterator[Batch]]:
    """Yield `batches` of each of some arrays of positions, decoded ahead from one to the next.

    Each has to be used up before the next is asked for.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}")
    dataset.manifest(split)  # made here once, and not in every worker
    size = PIECE if workers else batch_size
    cuts = [_cuts(len(part), batch_size, size) for part in positions]
    rows = [part[cut.start : cut.stop] for part, its in zip(positions, cuts, strict=True)
            for cut in its]  # fmt: skip
    ahead = max(PREFETCH, -(-2 * batch_size // (PIECE * max(workers, 1))))
    loader: Any = DataLoader(
        _Pieces(dataset, split, rows, transform, bad_images == "skip"),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        # A private generator: a loader draws a seed, by default from torch's global generator.
        generator=torch.Generator(),
    )
    pieces = _watched(loader)
    return (_put_together(pieces, its, on_bad) for its in cuts)


def _put_together(
    pieces: Generator[_Piece | SaebenchError],
    cuts: Sequence[_Cut],
    on_bad: Callable[[int, str], None],
) -> Iterator[Batch]:
    """The batches that the next pieces are of."""
    rows, images = [], []
    try:
        for cut in cuts:
            piece = next(pieces)
            if isinstance(piece, SaebenchError):
                raise piece
            for row, why in piece.bad:
                on_bad(row, why)
            if piece.images is not None:
                rows.append(piece.rows)
                images.append(piece.images)
            if cut.last and images:
                yield np.concatenate(rows), _joined(images)
                rows, images = [], []
    except BaseException:
        pieces.close()  # the workers end now: nobody goes on from here
        raise


class _Cut(NamedTuple):
    """A piece of a batch: positions[start:stop]."""

    start: int
    stop: int
    last: bool  # of its batch


def _cuts(n: int, batch_size: int, piece: int) -> list[_Cut]:
    found = []
    for start in range(0, n, batch_size):
        stop = min(start + batch_size, n)
        edges = [*range(start, stop, piece), stop]
        found += [_Cut(a, b, b == stop) for a, b in pairwise(edges)]
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
        rows: list[np.ndarray],
        transform: Transform,
        skip: bool,
    ) -> None:
        self.dataset, self.split, self.rows = dataset, split, rows
        self.transform, self.skip = transform, skip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> _Piece | SaebenchError:
        # Errors are handed over as values: torch would rewrite what is raised in a worker.
        try:
            return self._piece(self.rows[number])
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


def _watched(loader: Any) -> Generator[_Piece | SaebenchError]:
    """The loader's items. A worker that dies is an error here, and nowhere else."""
    with _own_signals():
        items = iter(loader)
    try:
        while True:
            try:
                piece = next(items)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                # What a dead worker had decoded ahead cannot be fetched from it any more.
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                why = str(error) or "it is gone"
                break
            yield piece
    finally:
        # It ends its workers when its last reference goes. As a part of a cycle of references, an
        # error's frames for one, it would be taken apart with its queues and wait for them in vain.
        del items
    raise SaebenchError(
        f"a process that decodes images was killed ({why})",
        "memory ran out, or shared memory (/dev/shm; docker's --shm-size): use fewer, with "
        " --workers 2  or  --workers 0",
    )


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
