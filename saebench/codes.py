"""Sparse codes: z, n rows of s latents of which few are not zero, in compressed rows (CSR).

Row i has its non-zero latents at `indices_m[offsets_n1[i]:offsets_n1[i + 1]]`, m of them in all.
A value that is zero is never stored, so that counting stored values is counting z ≠ 0, the
predicate of l0 and density.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from saebench.moving import moved


@dataclass(frozen=True, eq=False)
class Frame:
    """What decoding needs of the rows that were encoded, and that their codes do not hold.

    x̂ = scale·(û + skip) + shift, where û is what the codes decode to. `scale_n` and `shift_n` [n]
    are of an SAE that normalises each row (a layer norm, a length), `skip_nd` [n d] of a transcoder
    with a skip connection.
    """

    scale_n: Tensor | None = None
    shift_n: Tensor | None = None
    skip_nd: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        return self.scale_n, self.shift_n, self.skip_nd

    def undo(self, u_nd: Tensor) -> Tensor:
        """scale·(û + skip) + shift, [n d]."""
        if self.skip_nd is not None:
            u_nd = u_nd + self.skip_nd
        if self.scale_n is not None:
            u_nd = u_nd * self.scale_n[:, None]
        return u_nd if self.shift_n is None else u_nd + self.shift_n[:, None]

    def __getitem__(self, rows: slice) -> Frame:
        return Frame(*(None if part is None else part[rows] for part in self.parts))

    @classmethod
    def cat(cls, frames: Sequence[Frame]) -> Frame:
        """The rows of all, one after the other: all have the same parts."""
        columns = zip(*(frame.parts for frame in frames), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


@dataclass(frozen=True, eq=False)
class Codes:
    """offsets_n1 [n+1] int64, indices_m [m] int64 (latents), values_m [m] float32, none zero.

    `frame`: what an SAE that normalises its rows needs to decode them; None for all others.
    """

    d_sae: int
    offsets_n1: Tensor
    indices_m: Tensor
    values_m: Tensor
    frame: Frame | None = None

    @classmethod
    def from_dense(cls, z_ns: Tensor, frame: Frame | None = None) -> Codes:
        """The non-zero entries of z [n s]."""
        return cls.where(z_ns != 0, z_ns).framed(frame)

    @classmethod
    def where(cls, keep_ns: Tensor, z_ns: Tensor) -> Codes:
        """The entries of z where `keep_ns` is true; none of them may be zero."""
        n, d_sae = z_ns.shape
        at_m = _flat_nonzero(keep_ns)
        offsets_n1 = torch.searchsorted(at_m, d_sae * torch.arange(n + 1, device=at_m.device))
        return cls(d_sae, offsets_n1, at_m % max(d_sae, 1), z_ns.flatten()[at_m])

    @classmethod
    def from_topk(cls, values_nk: Tensor, indices_nk: Tensor, d_sae: int) -> Codes:
        """k latents a row; those whose value is zero are dropped."""
        keep_nk = values_nk != 0
        offsets_n1 = _offsets(keep_nk.sum(dim=1))
        return cls(d_sae, offsets_n1, indices_nk[keep_nk], values_nk[keep_nk])

    @classmethod
    def empty(cls, n_rows: int, d_sae: int, device: torch.device | str = "cpu") -> Codes:
        """n rows without a single active latent."""
        offsets_n1 = torch.zeros(n_rows + 1, dtype=torch.int64, device=device)
        return cls(d_sae, offsets_n1, offsets_n1[:0], torch.zeros(0, device=device))

    @classmethod
    def cat(cls, parts: Sequence[Codes]) -> Codes:
        """The rows of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        counts_n = torch.cat([part.l0_n() for part in parts])
        frames = [part.frame for part in parts if part.frame is not None]
        return cls(
            parts[0].d_sae,
            _offsets(counts_n),
            torch.cat([part.indices_m for part in parts]),
            torch.cat([part.values_m for part in parts]),
            Frame.cat(frames) if frames else None,
        )

    def framed(self, frame: Frame | None) -> Codes:
        """The same codes, with what their rows need to be decoded."""
        return self if frame is None else replace(self, frame=frame)

    @property
    def n_rows(self) -> int:
        return self.offsets_n1.shape[0] - 1

    @property
    def n_nonzero(self) -> int:
        """m, the number of stored values of all rows."""
        return self.values_m.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values_m.device

    @cached_property
    def rows_m(self) -> Tensor:
        """[m] int64, the row of each stored value; it never falls."""
        rows_n = torch.arange(self.n_rows, device=self.device)
        return rows_n.repeat_interleave(self.l0_n(), output_size=self.values_m.shape[0])

    def nonzero(self) -> tuple[Tensor, Tensor, Tensor]:
        """(row_m, latent_m, value_m) of every stored value, row by row."""
        return self.rows_m, self.indices_m, self.values_m

    def dense(self) -> Tensor:
        """z [n s] float32."""
        z_ns = self.values_m.new_zeros(self.n_rows, self.d_sae)
        z_ns[self.rows_m, self.indices_m] = self.values_m
        return z_ns

    def l0_n(self) -> Tensor:
        """[n] int64, the number of active latents of each row."""
        return self.offsets_n1.diff()

    def l1_n(self) -> Tensor:
        """[n] float64, Σ_j |z_ij|."""
        return self.sum_n(self.values_m.double().abs())

    def sum_n(self, terms_m: Tensor) -> Tensor:
        """[n] float64, the sum over each row of one term for every stored value."""
        return torch.segment_reduce(terms_m.double(), "sum", offsets=self.offsets_n1)

    def __getitem__(self, rows: slice) -> Codes:
        """A stretch of the rows."""
        start, stop, step = rows.indices(self.n_rows)
        if step != 1:
            raise IndexError("codes are cut in stretches of rows, step 1")
        offsets_n1 = self.offsets_n1[start : max(start, stop) + 1]
        first, last = int(offsets_n1[0]), int(offsets_n1[-1])
        return Codes(
            self.d_sae,
            offsets_n1 - first,
            self.indices_m[first:last],
            self.values_m[first:last],
            None if self.frame is None else self.frame[rows],
        )

    def to(self, device: torch.device | str) -> Codes:
        """The same codes on another device."""
        return moved(self, device)


def _offsets(counts_n: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts_n.cumsum(0), (1, 0))


def _flat_nonzero(keep_ns: Tensor) -> Tensor:
    """[m] int64, where the flattened mask is true. On the CPU NumPy is several times faster."""
    if keep_ns.device.type != "cpu":
        return keep_ns.flatten().nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(keep_ns.numpy()))
