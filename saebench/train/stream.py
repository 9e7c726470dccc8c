"""The rows that SAEs are trained on, as a function of the step: batch(i) -> [n d].

Images are visited in epochs. What fits the memory cap is a *window* of images, whose rows are
shuffled as a whole. If all images fit, there is one window, computed once and kept; otherwise each
epoch permutes the images and cuts them into windows. Batches do not straddle windows: the rows
left over after the last whole batch of a window come up in another epoch, at another place.

Every permutation is drawn from (stream seed, epoch, window), so a batch depends on its step alone:
all SAEs of a call see the same rows, and resuming means to ask for the next step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from saebench.errors import DataError, NonFiniteError

TILE = 8192  # rows of one tile of the sample


class Source(Protocol):
    """Images as rows of activations: image i gives rows i·t … i·t + t − 1."""

    n_images: int
    n_tokens: int  # t
    d_model: int

    def rows(self, images: np.ndarray) -> Tensor:
        """[len(images)·t d] float32 on the CPU, image-major; fewer where images were left out."""
        ...


class Rows:
    """A source of given rows, one row an image."""

    n_tokens = 1

    def __init__(self, x_nd: Tensor) -> None:
        self.x_nd = x_nd
        self.n_images, self.d_model = x_nd.shape

    def rows(self, images: np.ndarray) -> Tensor:
        return self.x_nd[torch.from_numpy(images)]


class Stream:
    """Batches of shuffled rows. `memory` is the bytes that the rows of a window may take."""

    def __init__(self, source: Source, batch_rows: int, *, memory: int, seed: int = 0) -> None:
        total = source.n_images * source.n_tokens
        if total < batch_rows:
            raise DataError(
                f"there are {total} rows of activations, fewer than one batch of {batch_rows}",
                "use a smaller --batch-rows, or more images",
            )
        self.source, self.batch_rows, self.seed = source, batch_rows, seed
        self.images_a_window = images_a_window(
            source.n_images, source.n_tokens, source.d_model, batch_rows, memory
        )
        self._key: tuple[int, int] | None = None
        self._x_nd = torch.empty(0)
        self._order = torch.empty(0, dtype=torch.int64)
        counts = [self._batches(len(part)) for part in self._cut(np.arange(source.n_images))]
        self._ends = np.cumsum(counts)

    @property
    def cached(self) -> bool:
        """Whether all rows are held at once."""
        return self.images_a_window == self.source.n_images

    @property
    def batches_an_epoch(self) -> int:
        return int(self._ends[-1])

    def batch(self, step: int) -> Tensor:
        """[batch_rows d], the rows of a training step. Errors: NonFiniteError."""
        epoch, place = divmod(step, self.batches_an_epoch)
        window = int(np.searchsorted(self._ends, place, side="right"))
        self._open(epoch, window)
        first = place - (int(self._ends[window - 1]) if window else 0)
        start = first * self.batch_rows
        rows = self._order[start : start + self.batch_rows]
        if len(rows) < self.batch_rows:
            # Images that were left out have no rows: the window goes round to its beginning.
            rows = self._order[torch.arange(start, start + self.batch_rows) % len(self._order)]
        return self._x_nd[rows]

    def sample(self, n_rows: int) -> Iterator[Tensor]:
        """Tiles [≤TILE d] of a fixed sample of the first window: n_rows, or all that there are."""
        self._open(0, 0)
        n = min(n_rows, len(self._x_nd))
        picked = _permutation(self.seed, 0, 0, len(self._x_nd))[:n]
        picked.sort()
        for part in torch.from_numpy(picked).split(TILE):
            yield self._x_nd[part]

    def _cut(self, images: np.ndarray) -> list[np.ndarray]:
        parts = range(0, len(images), self.images_a_window)
        return [images[i : i + self.images_a_window] for i in parts]

    def _batches(self, n_images: int) -> int:
        return n_images * self.source.n_tokens // self.batch_rows

    def _open(self, epoch: int, window: int) -> None:
        if self._key == (epoch, window):
            return
        if not self.cached:
            self._x_nd = torch.empty(0)  # let go of the last window before the next is made
            images = _permutation(self.seed, epoch, 0, self.source.n_images)
            self._x_nd = _finite(self.source.rows(self._cut(images)[window]))
        elif self._key is None:
            self._x_nd = _finite(self.source.rows(np.arange(self.source.n_images)))
        order = _permutation(self.seed, epoch, window + 1, len(self._x_nd))
        self._order, self._key = torch.from_numpy(order), (epoch, window)


def images_a_window(
    n_images: int, n_tokens: int, d_model: int, batch_rows: int, memory: int
) -> int:
    """How many images' rows fit into `memory` bytes: at least one batch, at most all."""
    bytes_an_image = n_tokens * (4 * d_model + 8)  # a row and its place
    fewest = -(-batch_rows // n_tokens)
    return min(max(memory // bytes_an_image, fewest), n_images)


def _permutation(seed: int, epoch: int, part: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, part]).permutation(n)


def _finite(x_nd: Tensor) -> Tensor:
    bad_n = ~torch.isfinite(x_nd.sum(-1))
    if bad_n.any():
        raise NonFiniteError(
            f"{int(bad_n.sum())} of {len(x_nd)} rows of activations are NaN or infinite",
            "check the backbone's weights and preprocessing: saebench check backbone NAME",
        )
    return x_nd
