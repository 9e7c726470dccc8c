"""The rows a linear probe is fitted on: features scaled by one mean and one scalar, block by block.

    x̃ = (x − μ)/s      μ [d] the mean of the rows, s the root mean square of x − μ over all entries

To scale each dimension by itself would let the result depend on the axes; this does not, and
neither μ nor an unpenalised bias moves the optimum. x̃ is never kept: a block of successive rows is
scaled as it is read, so that it stays in the processor's cache, and rows take no memory but their
own. A solver needs x̃ W and x̃ᵀ R of each block only, so that rows in memory, in files, and sparse
ones are all fitted by the same.
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
    """Rows in memory, of any float dtype, as they are. kept: which of them; all where None."""

    x_nd: Tensor
    labels: Tensor
    mean_d: Tensor
    scale: float
    dtype: torch.dtype
    kept: Tensor | None = None

    @classmethod
    def of(cls, x_nd: Tensor, y_n: Tensor, dtype: torch.dtype = torch.float32) -> DenseRows:
        """Scaled by their own mean and spread; rows that are all alike are not scaled."""
        size = _size(x_nd.shape[1])
        total_d = torch.zeros(x_nd.shape[1], dtype=torch.float64, device=x_nd.device)
        for x_md in x_nd.split(size):
            total_d += x_md.sum(dim=0, dtype=torch.float64)
        mean_d = total_d / len(x_nd)
        squares = 0.0
        for x_md in x_nd.split(size):
            squares += float((x_md.double() - mean_d).square_().sum())
        return cls(x_nd, y_n, mean_d, (squares / x_nd.numel()) ** 0.5 or 1.0, dtype)

    @property
    def y_n(self) -> Tensor:
        return self.labels if self.kept is None else self.labels[self.kept]

    @property
    def n(self) -> int:
        return len(self.x_nd if self.kept is None else self.kept)

    @property
    def d(self) -> int:
        return self.x_nd.shape[1]

    @property
    def device(self) -> torch.device:
        return self.x_nd.device

    def blocks(self) -> Iterator[DenseBlock]:
        size, y_n = _size(self.d), self.y_n
        own_md = torch.empty(min(size, self.n), self.d, dtype=self.dtype, device=self.device)
        for begin in range(0, self.n, size):
            some = slice(begin, begin + size)
            own = own_md[: self.n - begin]  # one piece of memory for all: new pages cost much time
            yield DenseBlock(self._scaled(some, own), y_n[some])

    def covariance(self, at_most: int) -> Tensor | None:
        if self.d > 4096:
            return None
        found_dd = torch.zeros(self.d, self.d, dtype=self.dtype, device=self.device)
        place_m = spread(self.n, at_most, self.device)
        for some in place_m.split(_size(self.d)):
            own_md = torch.empty(len(some), self.d, dtype=self.dtype, device=self.device)
            x_md = self._scaled(some, own_md)
            found_dd.addmm_(x_md.T, x_md)
        return found_dd / len(place_m)

    def where(self, keep_n: Tensor) -> DenseRows:
        place_m = keep_n.nonzero().squeeze(1)
        kept = place_m if self.kept is None else self.kept[place_m]
        return DenseRows(self.x_nd, self.labels, self.mean_d, self.scale, self.dtype, kept)

    def _scaled(self, some: slice | Tensor, own_md: Tensor) -> Tensor:
        """x̃ of some rows, in own_md. The mean is taken off before anything is scaled."""
        which = some if self.kept is None else self.kept[some]
        x_md, mean_d = self.x_nd[which], self.mean_d.to(self.dtype)
        return torch.sub(x_md, mean_d, out=own_md).mul_(1 / self.scale)


def spread(n: int, at_most: int, device: torch.device) -> Tensor:
    """Places of n rows, evenly spread and no more than `at_most`, int64."""
    m = min(n, at_most)
    return torch.arange(m, device=device) * n // max(m, 1)


def _size(d: int) -> int:
    return max(1, BLOCK // max(d, 1))
