"""Pieces of files on their way to a device: while one is used, a thread reads the next.

There are two places in memory, filled in turn. On a GPU they are pinned, and each has its copy
there, which is written while the GPU computes with the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Form = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, eq=False)
class Place:
    """Memory of one piece, and the same on the device: where that is the CPU, itself."""

    host: tuple[Tensor, ...]
    there: tuple[Tensor, ...]

    @classmethod
    def of(cls, forms: Sequence[Form], device: torch.device) -> Place:
        pinned = device.type == "cuda"
        host = tuple(torch.empty(shape, dtype=dtype, pin_memory=pinned) for shape, dtype in forms)
        same = device.type == "cpu"
        return cls(host, host if same else tuple(torch.empty_like(h, device=device) for h in host))


def staged(
    n: int,
    fill: Callable[[int, tuple[np.ndarray, ...]], Sequence[int]],
    forms: Sequence[Form],
    device: torch.device,
) -> Iterator[tuple[Tensor, ...]]:
    """Pieces 0 … n − 1 on the device: of each array its first rows, good until the next piece.

    fill(i, arrays) writes piece i into arrays of these forms, in a thread, and says how many rows
    of each it is. An error of it is raised in the piece's turn.
    """
    places = [Place.of(forms, device) for _ in range(min(n, 2))]
    moving = _Moving(device) if device.type == "cuda" else None

    def begun(i: int) -> tuple[Tensor, ...]:
        place = places[i % 2]
        if moving:
            moving.wait_until_read(i)
        lengths = fill(i, tuple(h.numpy() for h in place.host))
        host = [h[:m] for h, m in zip(place.host, lengths, strict=True)]
        there = [t[:m] for t, m in zip(place.there, lengths, strict=True)]
        if moving:
            moving.copy(i, host, there)
        elif device.type != "cpu":
            for one, other in zip(there, host, strict=True):
                one.copy_(other)
        return tuple(there)

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(begun, 0) if n else None
        for i in range(n):
            assert coming is not None
            piece = coming.result()
            coming = thread.submit(begun, i + 1) if i + 1 < n else None
            if moving:
                moving.arrived(i)
            yield piece
            if moving:
                moving.used(i)


class _Moving:
    """Copies to a GPU on a stream of their own: by place, events of the last copy and use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._used = [torch.cuda.Event() for _ in range(2)]

    def wait_until_read(self, i: int) -> None:
        """Until the pinned memory may be written again."""
        self._copied[i % 2].synchronize()

    def copy(self, i: int, host: Sequence[Tensor], there: Sequence[Tensor]) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[i % 2])
            for one, other in zip(there, host, strict=True):
                one.copy_(other, non_blocking=True)
            self._copied[i % 2].record(self._stream)

    def arrived(self, i: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied[i % 2])

    def used(self, i: int) -> None:
        self._used[i % 2].record(torch.cuda.current_stream(self._device))
