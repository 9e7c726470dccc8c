"""The codes of n images as compressed rows, for a linear probe: scaled by one mean and one scalar.

    x̃ = (z − μ)/s        x̃ W = Z W/s − 1 (μᵀW)/s        x̃ᵀR = ZᵀR/s − μ (1ᵀR)/s

μ [d] the mean of the rows, s the root mean square of z − μ over all n·d entries, zeros included.
The mean is taken off implicitly: a large dictionary is never dense. Z W is a weighted sum of rows
of W for each image, ZᵀR one of rows of R for each latent, from a second copy of the codes, by
latent. Both are gathers (embedding_bag), twice as fast as sparse matrix products on a CPU, and the
same from run to run on a GPU. Where many codes are not zero, dense products are faster, and used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from saebench.probe.ranking import moments
from saebench.probe.rows import Block, DenseRows, Rows, spread

DENSE = 0.5  # share of codes that are not zero, from where on dense products are faster
COVARIANCE = 1024  # latents at most, whose covariance is worth its time
ROWS = 8192  # of a block at least; else as many as there are latents


@dataclass(frozen=True, eq=False)
class CsrBlock:
    """m rows of e codes. mean_d: μ/s, in the rows' dtype."""

    offsets_m1: Tensor
    latents_e: Tensor
    values_e: Tensor
    mean_d: Tensor
    scale: float
    y_m: Tensor

    def times(self, W_dc: Tensor) -> Tensor:
        found_mc = _sums(self.offsets_m1, self.latents_e, self.values_e, W_dc)
        return torch.add(-(self.mean_d @ W_dc), found_mc, alpha=1 / self.scale, out=found_mc)

    def transposed_times(self, R_mc: Tensor) -> Tensor:
        return _sums(*self._by_latent, R_mc).addr_(self.mean_d, R_mc.sum(dim=0), alpha=-1)

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets of latents, the row of each code, rows in order, and its value over s."""
        sorted_e, order_e = self.latents_e.int().sort(stable=True)
        every_d1 = torch.arange(len(self.mean_d) + 1, dtype=torch.int32, device=order_e.device)
        return (
            torch.searchsorted(sorted_e, every_d1, out_int32=True),
            _row_of(self.offsets_m1, self.latents_e).int().index_select(0, order_e),
            self.values_e.index_select(0, order_e) / self.scale,
        )


@dataclass(frozen=True, eq=False)
class CsrRows:
    """offsets_n1, indices_m, values_m: the codes as they are, none of them zero."""

    offsets_n1: Tensor
    indices_m: Tensor
    values_m: Tensor
    d: int
    y_n: Tensor
    mean_d: Tensor
    scale: float
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        offsets_n1: Tensor,
        indices_m: Tensor,
        values_m: Tensor,
        d: int,
        y_n: Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> CsrRows:
        """Scaled by their own mean and spread; rows that are all alike are not scaled."""
        n, device = len(y_n), offsets_n1.device
        found = moments(indices_m, values_m, d, n)
        scale = float(found.spread_d.sum() / max(n * d, 1)) ** 0.5 or 1.0
        mean_d = torch.from_numpy(found.mean_d).to(device)
        return cls(offsets_n1, indices_m, values_m, d, y_n.to(device), mean_d, scale, dtype)

    @property
    def n(self) -> int:
        return len(self.y_n)

    @property
    def device(self) -> torch.device:
        return self.offsets_n1.device

    def blocks(self) -> Iterator[Block]:
        yield from self._blocks if self._dense is None else self._dense.blocks()

    def covariance(self, at_most: int) -> Tensor | None:
        if self._dense is not None:
            return self._dense.covariance(at_most)
        if self.d > COVARIANCE:
            return None
        some = self._some(marked(spread(self.n, at_most, self.device), self.n))
        found_dd = torch.zeros(self.d, self.d, dtype=self.dtype, device=self.device)
        every_dd = torch.eye(self.d, dtype=self.dtype, device=self.device)
        for block in some._blocks:
            found_dd += block.transposed_times(block.times(every_dd))
        return found_dd / max(some.n, 1)

    def where(self, keep_n: Tensor) -> Rows:
        if self._dense is not None:
            return self._dense.where(keep_n)
        return self._some(keep_n)

    def taken(self, place_m: Tensor) -> Rows:
        if self._dense is not None:
            return self._dense.taken(place_m)
        if len(place_m) == self.n:
            return self
        return self._some(marked(place_m, self.n))

    def _some(self, keep_n: Tensor) -> CsrRows:
        length_n = self.offsets_n1.diff()
        keep_m = keep_n.repeat_interleave(length_n, output_size=len(self.indices_m))
        return replace(
            self,
            offsets_n1=pad(length_n[keep_n].cumsum(0), (1, 0)),
            indices_m=self.indices_m[keep_m].int(),
            values_m=self.values_m[keep_m],
            y_n=self.y_n[keep_n],
        )

    def columns(self, latents_k: Tensor) -> DenseRows:
        """Some latents, in the order given: rows of their own, with their own mean and spread."""
        return DenseRows.of(self.raw_columns(latents_k), self.y_n, self.dtype)

    def raw_columns(self, latents_k: Tensor) -> Tensor:
        """The same as they are, [n k]."""
        place_d = torch.full((self.d,), -1, device=self.device)
        place_d[latents_k] = torch.arange(len(latents_k), device=self.device)
        z_nk = self.values_m.new_zeros(self.n, len(latents_k))
        for begin in range(0, self.n, ROWS):
            offsets_m1, latents_e, values_e = self._rows(begin, begin + ROWS)
            row_e, place_e = _row_of(offsets_m1, latents_e), place_d[latents_e]
            kept_e = place_e >= 0
            z_nk[begin + row_e[kept_e], place_e[kept_e]] = values_e[kept_e]
        return z_nk

    def _rows(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets, latents and values of successive rows."""
        offsets_m1 = self.offsets_n1[begin : end + 1]
        inside = slice(int(offsets_m1[0]), int(offsets_m1[-1]))
        latents_e = self.indices_m[inside]
        offsets_m1 = (offsets_m1 - offsets_m1[0]).to(latents_e.dtype)
        return offsets_m1, latents_e, self.values_m[inside]

    @cached_property
    def _dense(self) -> DenseRows | None:
        """All latents, where so many codes are not zero that it is faster."""
        if len(self.indices_m) <= DENSE * self.n * self.d:
            return None
        z_nd = self.raw_columns(torch.arange(self.d, device=self.device)).to(self.dtype)
        scaled_nd = z_nd.sub_(self.mean_d.to(self.dtype)).mul_(1 / self.scale)
        return DenseRows(scaled_nd, self.y_n, self.mean_d, self.scale)

    @cached_property
    def _blocks(self) -> list[CsrBlock]:
        size = max(ROWS, self.d)
        return [self._block(begin, begin + size) for begin in range(0, self.n, size)]

    def _block(self, begin: int, end: int) -> CsrBlock:
        offsets_m1, latents_e, values_e = self._rows(begin, end)
        return CsrBlock(
            offsets_m1,
            latents_e,
            values_e.to(self.dtype),
            (self.mean_d / self.scale).to(self.dtype),
            self.scale,
            self.y_n[begin:end],
        )


def marked(place_m: Tensor, n: int) -> Tensor:
    """[n] bool: whether a row is at one of these places."""
    found_n = torch.zeros(n, dtype=torch.bool, device=place_m.device)
    found_n[place_m] = True
    return found_n


def _row_of(offsets_m1: Tensor, latents_e: Tensor) -> Tensor:
    """[e] int64: the row of each code."""
    row_m = torch.arange(len(offsets_m1) - 1, device=offsets_m1.device)
    return row_m.repeat_interleave(offsets_m1.diff(), output_size=len(latents_e))


def _sums(offsets_m1: Tensor, rows_e: Tensor, values_e: Tensor, W_dc: Tensor) -> Tensor:
    """Σ of value · W[row] over the codes between two offsets: [m c]."""
    if not len(rows_e):
        return W_dc.new_zeros(len(offsets_m1) - 1, W_dc.shape[1])
    return embedding_bag(
        rows_e,
        W_dc.contiguous(),
        offsets_m1,
        mode="sum",
        per_sample_weights=values_e,
        include_last_offset=True,
    )
