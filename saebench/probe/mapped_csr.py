"""Codes of a linear probe in files: those of ImageNet's train images, never whole in memory.

The rows of `CsrRows` for the same codes, with its kernels, piece by piece. Two pieces are in memory
at a time, and what sorts one of them by latent: about 60 bytes a code of up to `piece_bytes` / 8.
μ and s come from one pass, in float64:

    s² = [Σ z² − n ‖μ‖²] / (n d)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from saebench.probe.csr import COVARIANCE, ROWS, CsrRows, marked
from saebench.probe.parts import Parts
from saebench.probe.rows import Block, DenseRows, spread
from saebench.probe.staging import staged

PIECE_BYTES = 2**25


@dataclass(frozen=True, eq=False)
class MappedCsrRows:
    """n rows of codes in several maps. latents and values: all codes, one row's after another's.

    starts_n, counts_n: where in them the codes of each row begin, and how many they are.
    """

    latents: Parts
    values: Parts
    starts_n: np.ndarray
    counts_n: np.ndarray
    d: int
    y_n: Tensor
    mean_d: Tensor
    scale: float
    dtype: torch.dtype
    device: torch.device
    piece_bytes: int

    @classmethod
    def of(
        cls,
        offsets_n1: np.ndarray,
        parts: Sequence[tuple[np.ndarray, np.ndarray]],
        d: int,
        y_n: Tensor | np.ndarray,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        piece_bytes: int = PIECE_BYTES,
    ) -> MappedCsrRows:
        """Scaled by their own mean and spread; rows that are all alike are not scaled.

        parts: latents int32 and values float32 [m_i], none of them zero, and together those that
        the offsets (int64) tell of.
        """
        where = torch.device(device)
        raw = cls(
            Parts.of([latents for latents, _ in parts]),
            Parts.of([values for _, values in parts]),
            offsets_n1[:-1],
            np.diff(offsets_n1),
            d,
            torch.as_tensor(y_n, dtype=torch.int64, device=where),
            torch.zeros(d, dtype=torch.float64, device=where),
            1.0,
            dtype,
            where,
            piece_bytes,
        )
        total_d, squares = torch.zeros_like(raw.mean_d), raw.mean_d.new_zeros(())
        for piece in raw._pieces():
            values_e = piece.values_m.double()
            total_d.index_add_(0, piece.indices_m, values_e)
            squares += values_e.square_().sum()
        mean_d = total_d / max(raw.n, 1)
        own = float(squares - raw.n * mean_d.square().sum())
        scale = (max(own, 0.0) / max(raw.n * d, 1)) ** 0.5 or 1.0
        return replace(raw, mean_d=mean_d, scale=scale)

    @property
    def n(self) -> int:
        return len(self.counts_n)

    def blocks(self) -> Iterator[Block]:
        for piece in self._pieces():
            yield from piece.blocks()

    def covariance(self, at_most: int) -> Tensor | None:
        if self.d > COVARIANCE:
            return None
        some = self.taken(spread(self.n, at_most, self.device))
        found_dd = torch.zeros(self.d, self.d, dtype=self.dtype, device=self.device)
        every_dd = torch.eye(self.d, dtype=self.dtype, device=self.device)
        for block in some.blocks():
            found_dd += block.transposed_times(block.times(every_dd))
        return found_dd / max(some.n, 1)

    def where(self, keep_n: Tensor) -> MappedCsrRows:
        kept = keep_n.cpu().numpy()
        y_n = self.y_n[keep_n.to(self.device)]
        return replace(self, starts_n=self.starts_n[kept], counts_n=self.counts_n[kept], y_n=y_n)

    def taken(self, place_m: Tensor) -> CsrRows:
        some = self.where(marked(place_m, self.n))
        pieces = [
            (piece.offsets_n1.diff(), piece.indices_m.clone(), piece.values_m.clone())
            for piece in some._pieces()
        ]
        counts_n, indices_m, values_m = (torch.cat(arrays) for arrays in zip(*pieces, strict=True))
        offsets_n1 = pad(counts_n.cumsum(0), (1, 0))
        own = self.mean_d, self.scale, self.dtype
        return CsrRows(offsets_n1, indices_m, values_m, self.d, some.y_n, *own)

    def columns(self, latents_k: Tensor) -> DenseRows:
        """Some latents, in the order given, in memory: with their own mean and spread."""
        pieces = [piece.raw_columns(latents_k) for piece in self._pieces()]
        return DenseRows.of(torch.cat(pieces), self.y_n, self.dtype)

    def _pieces(self) -> Iterator[CsrRows]:
        """Successive rows, good until the next are asked for."""
        bounds = self._bounds()
        before_n1 = np.concatenate([[0], np.cumsum(self.counts_n)])
        most = int(np.diff(before_n1[bounds]).max(initial=0))

        def fill(i: int, arrays: tuple[np.ndarray, ...]) -> tuple[int, int]:
            rows = slice(bounds[i], bounds[i + 1])
            starts_m, counts_m = self.starts_n[rows], self.counts_n[rows]
            m = int(counts_m.sum())
            stop = starts_m[-1] + counts_m[-1]
            if stop - starts_m[0] == m:  # no row between is left out
                self.latents.read(starts_m[0], stop, arrays[0])
                self.values.read(starts_m[0], stop, arrays[1])
            else:
                shift_m = starts_m - (np.cumsum(counts_m) - counts_m)
                which_e = np.repeat(shift_m, counts_m) + np.arange(m)
                self.latents.take(which_e, arrays[0])
                self.values.take(which_e, arrays[1])
            return m, m

        forms = [((most,), torch.int32), ((most,), torch.float32)]
        pieces = staged(len(bounds) - 1, fill, forms, self.device)
        for i, (latents_e, values_e) in enumerate(pieces):
            begin, end = bounds[i], bounds[i + 1]
            offsets_m1 = torch.from_numpy(before_n1[begin : end + 1] - before_n1[begin])
            yield CsrRows(
                offsets_m1.to(self.device),
                latents_e,
                values_e,
                self.d,
                self.y_n[begin:end],
                self.mean_d,
                self.scale,
                self.dtype,
            )

    def _bounds(self) -> list[int]:
        """Before which rows the pieces begin, and the end: 0 … n.

        As many rows as `CsrRows` has in a block, and of no more codes than a piece holds; one row
        alone may have more.
        """
        codes_n = np.cumsum(self.counts_n)
        most, held = max(ROWS, self.d), self.piece_bytes // 8
        bounds = [0]
        while bounds[-1] < self.n:
            begin = bounds[-1]
            before = codes_n[begin - 1] if begin else 0
            fitting = int(np.searchsorted(codes_n, before + held, side="right"))
            bounds.append(min(max(fitting, begin + 1), begin + most, self.n))
        return bounds
