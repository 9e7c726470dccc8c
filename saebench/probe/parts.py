"""A long array in parts: read-only maps of files [n_i …], read piece by piece in flat memory.

Rows i … j−1 of the parts, as if they stood one after the other. What was read is dropped from the
process at once; it stays in the system's cache of files, where the next pass finds it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_SOON = getattr(mmap, "MADV_WILLNEED", None)  # neither exists on Windows
_DONE = getattr(mmap, "MADV_DONTNEED", None)


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts, and before which row each begins: [p + 1]."""

    arrays: tuple[np.ndarray, ...]
    starts: np.ndarray

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Parts:
        starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(tuple(arrays), starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """Views that together are rows first … last − 1, and the row before which each begins."""
        part = int(np.searchsorted(self.starts, first, side="right")) - 1
        while first < last:
            begin, end = int(self.starts[part]), min(int(self.starts[part + 1]), last)
            if first < end:
                yield first, self.arrays[part][first - begin : end - begin]
                first = end
            part += 1

    def read(self, first: int, last: int, out: np.ndarray) -> None:
        """Rows first … last − 1 into `out`, whose dtype they become."""
        for begin, piece in self.pieces(first, last):
            _advise(piece, _SOON)
            np.copyto(out[begin - first : begin - first + len(piece)], piece, casting="same_kind")
            _advise(piece, _DONE)

    def take(self, rows_m: np.ndarray, out: np.ndarray) -> None:
        """The rows of these numbers, which ascend, into `out`."""
        if not len(rows_m):
            return
        first, last = int(rows_m[0]), int(rows_m[-1]) + 1
        if last - first == len(rows_m):
            return self.read(first, last, out)
        for begin, piece in self.pieces(first, last):
            i, j = np.searchsorted(rows_m, (begin, begin + len(piece)))
            out[i:j] = piece[rows_m[i:j] - begin]
            _advise(piece, _DONE)


def _advise(view: np.ndarray, what: int | None) -> None:
    """Tell the system that the bytes of a view are needed soon, or not any more.

    Only of a map that nothing is written to: another one would lose what was written.
    """
    mapped = _file(view)
    if mapped is None or what is None or not view.size:
        return
    begin = view.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
    page = begin - begin % mmap.PAGESIZE
    mapped.madvise(what, page, begin + view.nbytes - page)


def _file(view: np.ndarray) -> mmap.mmap | None:
    """The read-only map that an array is a contiguous view of, if it is one."""
    read_only, owner = False, view
    while isinstance(owner, np.ndarray):
        read_only = isinstance(owner, np.memmap) and owner.mode == "r"
        owner = owner.base
    return owner if read_only and view.flags.c_contiguous and isinstance(owner, mmap.mmap) else None
