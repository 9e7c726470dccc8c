"""Millions of short texts in the space of their bytes: file names of large datasets.

A Python string costs 50 bytes beside its letters; here a text costs its UTF-8 bytes and one more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class _Strings(Sequence[str], ABC):
    """n strings that are made when they are asked for."""

    @abstractmethod
    def _at(self, place: int) -> str:
        """The string at 0 <= place < n."""

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        places = range(len(self))[index]
        return self._at(places) if isinstance(places, int) else [self._at(i) for i in places]


class Texts(_Strings):
    """Texts without NUL, which separates them. `data`: uint8, each text followed by a NUL."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self._ends = np.flatnonzero(data == 0)

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Errors: UnicodeEncodeError for a file name that is not UTF-8."""
        joined = "".join(f"{text}\0" for text in texts)
        return cls(np.frombuffer(joined.encode(), dtype=np.uint8))

    def __len__(self) -> int:
        return len(self._ends)

    def _at(self, place: int) -> str:
        start = int(self._ends[place - 1]) + 1 if place else 0
        return self.data[start : self._ends[place]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return iter(self.data.tobytes().decode().split("\0")[:-1])


class Paths(_Strings):
    """`<folder>/<name>` of n files, each folder kept once. folder_of: [n] integers."""

    def __init__(self, folders: Sequence[str], folder_of: np.ndarray, names: Sequence[str]) -> None:
        self.folders, self.folder_of, self.names = folders, folder_of, names

    def __len__(self) -> int:
        return len(self.folder_of)

    def _at(self, place: int) -> str:
        return _join(self.folders[int(self.folder_of[place])], self.names[place])

    def __iter__(self) -> Iterator[str]:
        folders = list(self.folders)
        for folder, name in zip(self.folder_of.tolist(), self.names, strict=True):
            yield _join(folders[folder], name)


class Picked(_Strings):
    """Some of many texts: those at `places` [n]."""

    def __init__(self, texts: Sequence[str], places: np.ndarray) -> None:
        self.texts, self.places = texts, places

    def __len__(self) -> int:
        return len(self.places)

    def _at(self, place: int) -> str:
        return self.texts[int(self.places[place])]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
