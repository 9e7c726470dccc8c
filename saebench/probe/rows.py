"""The rows a linear probe is fitted on: features scaled by one mean and one scalar, block by block.

    x̃ = (x − μ)/s      μ [d] the mean of the rows, s the root mean square of x − μ over all entries

To scale each dimension by itself would let the result depend on the axes; this does not, and
neither μ nor an unpenalised bias moves the optimum. A solver needs x̃ W and x̃ᵀ R of each block of
successive rows only, so that rows in memory, in files, and sparse ones are all fitted by the same.
Rows in memory are kept scaled, beside those they were made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 2**20  # numbers of a block, about


class Block(Protocol):
    """m successive rows, scaled; good until the next block is asked for."""

    @property
    def y_m(self) -> Tensor:
        """Their labels, int64."""
        ...

    def times(self, W_dc: Tensor) -> Tensor:
        """x̃ W [m c]."""
        ...

    def transposed_times(self, R_mc: Tensor) -> Tensor:
        """x̃ᵀ R [d c]."""
        ...


class Rows(Protocol):
    """n rows of d features, of `dtype`, with labels; all tensors are on `device`."""

    @property
    def n(self) -> int: ...

    @property
    def d(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def y_n(self) -> Tensor:
        """int64."""
        ...

    @property
    def mean_d(self) -> Tensor:
        """μ, float64."""
        ...

    @property
    def scale(self) -> float:
        """s; 1 where the rows are all alike."""
        ...

    def blocks(self) -> Iterator[Block]:
        """All rows, in order."""
        ...

    def covariance(self, at_most: int) -> Tensor | None:
        """x̃ᵀx̃/m [d d] of m rows spread evenly, no more than `at_most`.

        None where d is so large that it costs more than it saves.
        """
        ...

    def where(self, keep_n: Tensor) -> Rows:
        """Some of the rows, scaled as they all are. keep_n: bool."""
        ...

    def taken(self, place_m: Tensor) -> Rows:
        """A few of the rows, in memory, scaled as they all are. place_m: int64, ascending."""
        ...


@dataclass(frozen=True, eq=False)
class DenseBlock:
    """Dense rows. Where it is multiplied by bfloat16, so are its own, and the result is."""

    x_md: Tensor
    y_m: Tensor

    def times(self, W_dc: Tensor) -> Tensor:
        return self._as(W_dc.dtype) @ W_dc

    def transposed_times(self, R_mc: Tensor) -> Tensor:
        return self._as(R_mc.dtype).T @ R_mc

    def _as(self, dtype: torch.dtype) -> Tensor:
        return self.x_md if dtype == self.x_md.dtype else self._low_md

    @cached_property
    def _low_md(self) -> Tensor:
        return self.x_md.bfloat16()


@dataclass(frozen=True, eq=False)
class DenseRows:
    """Rows in memory: x̃ [n d] of `dtype`. kept: which of them are meant; None: all."""

    scaled_nd: Tensor
    labels: Tensor
    mean_d: Tensor
    scale: float
    kept: Tensor | None = None

    @classmethod
    def of(cls, x_nd: Tensor, y_n: Tensor, dtype: torch.dtype = torch.float32) -> DenseRows:
        """Rows x of any float dtype, scaled by their own mean and spread; alike ones are not."""
        size = _size(x_nd.shape[1])
        total_d = torch.zeros(x_nd.shape[1], dtype=torch.float64, device=x_nd.device)
        for x_md in x_nd.split(size):
            total_d += x_md.sum(dim=0, dtype=torch.float64)
        mean_d = total_d / len(x_nd)
        squares, scaled_nd = 0.0, torch.empty(x_nd.shape, dtype=dtype, device=x_nd.device)
        for x_md, own_md in zip(x_nd.split(size), scaled_nd.split(size), strict=True):
            torch.sub(x_md.to(dtype), mean_d.to(dtype), out=own_md)
            squares += float(own_md.square().sum(dtype=torch.float64))
        scale = (squares / max(x_nd.numel(), 1)) ** 0.5 or 1.0
        return cls(scaled_nd.mul_(1 / scale), y_n, mean_d, scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.scaled_nd.dtype

    @property
    def y_n(self) -> Tensor:
        return self.labels if self.kept is None else self.labels[self.kept]

    @property
    def n(self) -> int:
        return len(self.scaled_nd if self.kept is None else self.kept)

    @property
    def d(self) -> int:
        return self.scaled_nd.shape[1]

    @property
    def device(self) -> torch.device:
        return self.scaled_nd.device

    def blocks(self) -> Iterator[DenseBlock]:
        size, y_n = _size(self.d), self.y_n
        own_md: Tensor | None = None
        for begin in range(0, self.n, size):
            labels_m = y_n[begin : begin + size]
            if self.kept is None:
                yield DenseBlock(self.scaled_nd[begin : begin + size], labels_m)
                continue
            if own_md is None or len(own_md) != len(labels_m):
                # One piece of memory for all blocks: new pages cost much time.
                own_md = self.scaled_nd.new_empty(len(labels_m), self.d)
            some = self.kept[begin : begin + size]
            yield DenseBlock(torch.index_select(self.scaled_nd, 0, some, out=own_md), labels_m)

    def covariance(self, at_most: int) -> Tensor | None:
        if self.d > 4096:
            return None
        x_md = self.taken(spread(self.n, at_most, self.device)).scaled_nd
        return x_md.T @ x_md / len(x_md)

    def where(self, keep_n: Tensor) -> DenseRows:
        place_m = keep_n.nonzero().squeeze(1)
        kept = place_m if self.kept is None else self.kept[place_m]
        return DenseRows(self.scaled_nd, self.labels, self.mean_d, self.scale, kept)

    def taken(self, place_m: Tensor) -> DenseRows:
        kept = place_m if self.kept is None else self.kept[place_m]
        return DenseRows(self.scaled_nd[kept], self.labels[kept], self.mean_d, self.scale)


def spread(n: int, at_most: int, device: torch.device) -> Tensor:
    """Places of n rows, evenly spread and no more than `at_most`, int64."""
    m = min(n, at_most)
    return torch.arange(m, device=device) * n // max(m, 1)


def _size(d: int) -> int:
    return max(1, BLOCK // max(d, 1))
