"""Rows of a linear probe in files: features of ImageNet-train size, never whole in memory.

x̃ = (x − μ)/s, the numbers that `DenseRows` gives for the same x, block by block, and to the bit
where μ and s are. Two pieces of `piece_bytes` are in memory at a time; μ and s come from one pass,
in float64, of sums shifted by the first row x₁:

    s² = [Σ (x − x₁)² − n ‖μ − x₁‖²] / (n d)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from saebench.probe.parts import Parts
from saebench.probe.rows import BLOCK, DenseBlock, DenseRows, spread
from saebench.probe.staging import staged

PIECE_BYTES = 2**25


@dataclass(frozen=True, eq=False)
class MappedRows:
    """Rows of several maps [n_i d] of a float dtype, one after the other, streamed to a device.

    kept: the numbers of the rows meant, ascending; None: all. The maps themselves are not written.
    """

    parts: Parts
    y_n: Tensor
    mean_d: Tensor
    scale: float
    dtype: torch.dtype
    device: torch.device
    piece_bytes: int
    kept: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        parts: Sequence[np.ndarray],
        y_n: Tensor | np.ndarray,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        piece_bytes: int = PIECE_BYTES,
    ) -> MappedRows:
        """Scaled by their own mean and spread; rows that are all alike are not scaled."""
        where, d = torch.device(device), parts[0].shape[1]
        labels = torch.as_tensor(y_n, dtype=torch.int64, device=where)
        zero_d = torch.zeros(d, dtype=torch.float64, device=where)
        raw = cls(Parts.of(parts), labels, zero_d, 1.0, dtype, where, piece_bytes)
        total_d, squares, first_d = zero_d.clone(), zero_d.new_zeros(()), None
        for x_md in raw._raw():
            first_d = x_md[0].double() if first_d is None else first_d
            total_d += x_md.sum(dim=0, dtype=torch.float64)
            squares += (x_md.double() - first_d).square_().sum()
        if first_d is None:
            return raw
        mean_d = total_d / raw.n
        own = float(squares - raw.n * (mean_d - first_d).square().sum())
        return replace(raw, mean_d=mean_d, scale=(max(own, 0.0) / (raw.n * d)) ** 0.5 or 1.0)

    @property
    def n(self) -> int:
        return len(self.parts) if self.kept is None else len(self.kept)

    @property
    def d(self) -> int:
        return len(self.mean_d)

    def blocks(self) -> Iterator[DenseBlock]:
        begin, mean_d = 0, self.mean_d.to(self.dtype)
        for x_md in self._raw():
            end = begin + len(x_md)
            yield DenseBlock(x_md.sub_(mean_d).mul_(1 / self.scale), self.y_n[begin:end])
            begin = end

    def covariance(self, at_most: int) -> Tensor | None:
        if self.d > 4096:
            return None
        found_dd = torch.zeros(self.d, self.d, dtype=self.dtype, device=self.device)
        some = self._at(spread(self.n, at_most, torch.device("cpu")).numpy())
        for block in some.blocks():
            found_dd.addmm_(block.x_md.T, block.x_md)
        return found_dd / some.n

    def where(self, keep_n: Tensor) -> MappedRows:
        return self._at(keep_n.cpu().numpy().nonzero()[0])

    def taken(self, place_m: Tensor) -> DenseRows:
        some = self._at(place_m.cpu().numpy())
        blocks = [block.x_md.clone() for block in some.blocks()]
        return DenseRows(torch.cat(blocks), some.y_n, self.mean_d, self.scale)

    def _at(self, place_m: np.ndarray) -> MappedRows:
        kept = place_m if self.kept is None else self.kept[place_m]
        return replace(self, y_n=self.y_n[torch.from_numpy(place_m).to(self.device)], kept=kept)

    def _raw(self) -> Iterator[Tensor]:
        """x [m d] as it is, good until the next is asked for, and free to be written."""
        # On a CPU a block stays in its cache; a GPU takes a piece at once.
        most = max(1, self.piece_bytes // (self.d * self.dtype.itemsize))
        block = min(max(1, BLOCK // self.d), most)
        piece = min(most // block * block, max(self.n, 1))

        def fill(i: int, arrays: tuple[np.ndarray, ...]) -> tuple[int]:
            first, last = i * piece, min((i + 1) * piece, self.n)
            if self.kept is None:
                self.parts.read(first, last, arrays[0])
            else:
                self.parts.take(self.kept[first:last], arrays[0])
            return (last - first,)

        forms = [((piece, self.d), self.dtype)]
        for (x_md,) in staged(-(-self.n // piece), fill, forms, self.device):
            yield from x_md.split(block if self.device.type == "cpu" else piece)
