"""Rows of a dataset as batches of tensors, cut at fixed places.

Batch j holds positions[j*size : (j+1)*size], whatever the number of worker processes: workers only
decode ahead. They work on pieces of a batch, so that the first batch is soon there and none waits
for one slow process, and hand them over in order. At least two batches are decoded ahead of the
one that is asked for, those of the next part among them (`parts`).
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from saebench.data.dataset import Dataset
from saebench.data.pieces import (
    PIECE,
    Cut,
    Piece,
    Pieces,
    Transform,
    cuts_of,
    ring_for,
    uneven,
)
from saebench.errors import SaebenchError

Batch = tuple[np.ndarray, torch.Tensor]  # rows of the manifest [b], images [b 3 h w]
PREFETCH = 4  # pieces decoded ahead by each worker, at least
MOST = 16  # workers: 16 decode 2,000 photographs a second and more


def choose_workers(dataset: Dataset, device: torch.device) -> int:
    """How many processes decode, where nobody says.

    None for what is drawn or held in memory. For image files: beside an accelerator, one for each
    CPU this process may use, at most 16; where the CPUs compute the backbone too, a quarter of
    them.
    """
    if not dataset.decodes:
        return 0
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cpus // 4) if device.type == "cpu" else cpus, MOST)


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
    cuts = [cuts_of(len(part), batch_size, size) for part in positions]
    rows = [
        part[cut.start : cut.stop] for part, its in zip(positions, cuts, strict=True) for cut in its
    ]
    items = Pieces(dataset, split, rows, transform, bad_images == "skip")
    ahead = max(PREFETCH, -(-2 * batch_size // (PIECE * max(workers, 1))))
    if workers:
        items.ring = ring_for(items, ahead * workers + 1)
    loader: Any = DataLoader(
        items,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        # A private generator: a loader draws a seed, by default from torch's global generator.
        generator=torch.Generator(),
    )
    pieces = _watched(loader, items.ring)
    return (_put_together(pieces, its, on_bad) for its in cuts)


def _put_together(
    pieces: Generator[Piece | SaebenchError],
    cuts: Sequence[Cut],
    on_bad: Callable[[int, str], None],
) -> Iterator[Batch]:
    """The batches that the next pieces are of."""
    rows: list[np.ndarray] = []
    batch_b3hw, n = torch.empty(0), 0
    try:
        for cut in cuts:
            piece = next(pieces)
            if isinstance(piece, SaebenchError):
                raise piece
            for row, why in piece.bad:
                on_bad(row, why)
            if piece.images is not None:
                batch_b3hw = _with_room(batch_b3hw if n else None, piece, cut)
                if batch_b3hw is not piece.images:
                    batch_b3hw[n : n + len(piece.rows)] = piece.images
                rows.append(piece.rows)
                n += len(piece.rows)
            if cut.last and n:
                yield np.concatenate(rows), batch_b3hw[:n]
                rows, n = [], 0
    except BaseException:
        pieces.close()  # the workers end now: nobody goes on from here
        raise


def _with_room(batch: torch.Tensor | None, piece: Piece, cut: Cut) -> torch.Tensor:
    """The tensor that a batch is put together in: the piece's own, where it is all of the batch."""
    assert piece.images is not None
    if batch is None:
        # What lies in the ring is written over later, and is never handed out.
        if cut.stop - cut.start == cut.batch and not piece.in_ring:
            return piece.images
        return torch.empty(cut.batch, *piece.images.shape[1:], dtype=piece.images.dtype)
    if batch.shape[1:] != piece.images.shape[1:]:
        raise uneven(batch.shape[1:], piece.images.shape[1:])
    return batch


def _watched(loader: Any, ring: torch.Tensor | None) -> Generator[Piece | SaebenchError]:
    """The loader's items. A worker that dies is an error here, and nowhere else."""
    code = 0
    with _own_signals():
        items = iter(loader)
    workers: Sequence[BaseProcess] = getattr(items, "_workers", ())
    wake = partial(_wake, workers)
    atexit.register(wake)  # it may be that nobody takes this generator apart before the end
    try:
        for number in count():
            try:
                piece = next(items)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                # What a dead worker had decoded ahead cannot be fetched from it any more.
                if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                    raise
                code = _exit_code(workers)
                break  # and raised below: this error's frames hold the loader
            if ring is not None and isinstance(piece, Piece) and piece.in_ring:
                piece = piece._replace(images=ring[number % len(ring), : len(piece.rows)])
            yield piece
    finally:
        wake()
        atexit.unregister(wake)
        # It ends its workers when its last reference goes. As a part of a cycle of references, an
        # error's frames for one, it would be taken apart with its queues and wait for them in vain.
        del items
    raise _death(code)


def _exit_code(workers: Sequence[BaseProcess]) -> int:
    """Of the worker that is gone; minus the signal that killed it, 0 where nothing is known."""
    gone = wait([worker.sentinel for worker in workers], timeout=5)  # its queue may go before it
    for worker in workers:
        if worker.sentinel in gone:
            worker.join(timeout=5)  # the sentinel closes a moment before the exit code is there
    return next((worker.exitcode for worker in workers if worker.exitcode), 0)


def _death(code: int) -> SaebenchError:
    if code >= 0:
        how = f"ended (exit code {code})" if code else "is gone"
    else:
        names = {one.value: one.name for one in signal.Signals}
        how = f"was killed by {names.get(-code, f'signal {-code}')}"
    return SaebenchError(
        f"a process that decodes images {how}",
        "memory ran out, most likely: use fewer processes, with  --workers 2  or  --workers 0"
        if how.endswith(("SIGKILL", "SIGBUS"))  # the system's killer; shared memory that is full
        else "run it again: what is finished is kept",
    )


def _wake(workers: Sequence[BaseProcess]) -> None:
    """Let workers that were stopped go on, to their end: torch, and Python's exit, wait for it."""
    for worker in workers:
        if worker.is_alive() and worker.pid and hasattr(signal, "SIGCONT"):
            os.kill(worker.pid, signal.SIGCONT)


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
