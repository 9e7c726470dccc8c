"""The rows of one split: which images, which labels, and in which order they are measured.

The order is one fixed class-stratified permutation. Within a class c of n_c images, images are
ranked r = 0, 1, … by a hash of (dataset, id); all images are then sorted by (r + 1/2) / n_c, ties
by the hash. Any prefix of the order so holds the classes in the proportions of the whole, to within
rounding, and prefixes nest: a limit of n is the first n. Nothing in it depends on a seed, on the
platform, or on the order in which the rows were listed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from saebench.errors import DataError, UsageError


@dataclass(frozen=True, eq=False)
class Manifest:
    """n rows. `ids` unique; `labels` [n] int64, the main label; `levels`: level -> [n] int64.

    `stratified = False`: the first rows of a stream, which are measured as they came.
    Errors: DataError for duplicate ids, negative labels, or columns of different lengths.
    """

    dataset: str
    split: str
    ids: tuple[str, ...]
    labels: np.ndarray
    levels: Mapping[str, np.ndarray] = field(default_factory=dict)
    stratified: bool = True

    def __post_init__(self) -> None:
        where = f"dataset '{self.dataset}', split '{self.split}'"
        for name, column in {"labels": self.labels, **self.levels}.items():
            if column.shape != (len(self.ids),) or column.dtype != np.int64:
                raise DataError(
                    f"{where}: '{name}' is {column.dtype}{list(column.shape)}, "
                    f"not int64[{len(self.ids)}], one value for each id"
                )
            if column.size and column.min() < 0:
                row = int(column.argmin())
                raise DataError(f"{where}: '{name}' of {self.ids[row]} is {column[row]}, below 0")
        twice = [name for name, count in Counter(self.ids).items() if count > 1]
        if twice:
            raise DataError(
                f"{where}: {len(twice)} ids occur more than once, the first is '{twice[0]}'",
                "give every image its own id; an image listed twice would be counted twice",
            )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def sha256(self) -> str:
        """Hash of dataset, split, and every (id, label), whatever order they are listed in."""
        digest = hashlib.sha256(f"saebench manifest 1\n{self.dataset}\n{self.split}\n".encode())
        for name, label in sorted(zip(self.ids, self.labels.tolist(), strict=True)):
            digest.update(f"{name}\t{label}\n".encode())
        return digest.hexdigest()

    def order(self, limit: int | None = None) -> np.ndarray:
        """[min(limit, n)] int64 row numbers, class-stratified (see the module). Limits nest.

        Of a stream: the rows as they are listed.
        """
        if limit is not None and limit < 1:
            raise UsageError(f"a limit of {limit} images measures nothing", "give 1 or more")
        return self._order[:limit] if self.stratified else np.arange(len(self))[:limit]

    @cached_property
    def _order(self) -> np.ndarray:
        return stratified_order(self.dataset, self.ids, self.labels)


def stratified_order(dataset: str, ids: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """[n] int64: the class-stratified permutation of rows that the module describes.

    A second or two for a million rows, most of it for the hashes.
    """
    prefix = f"{dataset}\n".encode()
    digests = b"".join(hashlib.sha256(prefix + name.encode()).digest() for name in ids)
    words = np.frombuffer(digests, dtype=">u8").reshape(len(ids), 4).astype(np.uint64)
    by_key = np.argsort(words[:, 0])
    if (np.diff(words[by_key, 0]) == 0).any():  # once in billions of datasets
        by_key = np.lexsort(words.T[::-1])
    # Rank in its class, by the hash: the place in a stable sort by class, less the class's first.
    by_class = by_key[np.argsort(labels[by_key], kind="stable")]
    _, first, size = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(ids)) - np.repeat(first, size)
    # The quotient is rounded correctly on every platform, so equal fractions compare equal.
    place = np.empty(len(ids))
    place[by_class] = (2 * rank + 1) / np.repeat(2 * size, size)
    return by_key[np.argsort(place[by_key], kind="stable")]
