"""Codes of train images as fits read them: in memory where they have room, else in their files.

A ranking of latents, trees and single latents need codes of many images at once. They look at the
first images of the sample, as many as have no more than LOOKED codes together: all of them, but for
a pass over ImageNet with a mean or a maximum over patches. The order of a sample is stratified by
class, and no test image is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from saebench.codes import Codes
from saebench.probe.csr import CsrRows
from saebench.probe.mapped_csr import MappedCsrRows
from saebench.probe.rows import DenseRows

LOOKED = 2**28  # codes: 3 GiB
IN_MEMORY = 2**28  # codes that a probe is fitted on without streaming them

Parts = Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class TrainCodes:
    """n images of d latents. offsets_n1: where the codes of each begin in all parts put together.

    parts: (latents int32, values float32) [m_i], as they lie in files.
    """

    offsets_n1: np.ndarray
    parts: Parts
    d: int

    @property
    def n(self) -> int:
        return len(self.offsets_n1) - 1

    @property
    def n_looked(self) -> int:
        """So many of the first images are looked at together."""
        return max(1, int(np.searchsorted(self.offsets_n1, LOOKED, side="right")) - 1)

    @property
    def large(self) -> bool:
        """Whether they are streamed."""
        return bool(self.offsets_n1[-1] > IN_MEMORY)

    def looked(self, keep_n: Tensor) -> Codes:
        """The codes of those of the first images that are kept. keep_n: bool."""
        keep_n = keep_n[: self.n_looked]
        codes = self._first(self.n_looked)
        if keep_n.all():
            return codes
        kept_m = keep_n[codes.rows_m]
        offsets_n1 = pad(codes.l0_n()[keep_n].cumsum(0), (1, 0))
        return Codes(self.d, offsets_n1, codes.indices_m[kept_m], codes.values_m[kept_m])

    def rows(self, y_n: Tensor, device: torch.device) -> CsrRows | MappedCsrRows:
        """Rows of a probe, of all images."""
        if self.large:
            return MappedCsrRows.of(self.offsets_n1, self.parts, self.d, y_n, device=device)
        codes = self._first(self.n).to(device)
        parts = codes.offsets_n1, codes.indices_m, codes.values_m
        return CsrRows.of(*parts, self.d, y_n.to(device))

    def columns(self, latents_k: Tensor, y_n: Tensor, device: torch.device) -> DenseRows:
        """A few latents as dense rows of their own, in the order given, of all images."""
        z_nk = np.zeros((self.n, len(latents_k)), np.float32)
        for images_m, own_m, values_m in self._of(latents_k):
            z_nk[images_m, own_m] = values_m
        return DenseRows.of(torch.from_numpy(z_nk).to(device), y_n.to(device))

    def only(self, latents_k: Tensor, folder: Path | None = None) -> TrainCodes:
        """The codes of some latents alone, numbered as they are listed. latents_k: ascending.

        folder: for what is too large for memory; files without a name, that end with their use.
        """
        counts_n = np.zeros(self.n, np.int64)

        def kept() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for images_m, own_m, values_m in self._of(latents_k):
                counts_n[:] += np.bincount(images_m, minlength=self.n)
                yield own_m, values_m

        if self.large:
            with TemporaryFile(dir=folder) as first, TemporaryFile(dir=folder) as second:
                for latents_m, values_m in kept():
                    first.write(latents_m.tobytes())
                    second.write(values_m.tobytes())
                parts = [(_mapped(first, np.int32), _mapped(second, np.float32))]
        else:
            parts = list(kept())
        return TrainCodes(np.concatenate([[0], counts_n.cumsum()]), parts, len(latents_k))

    def _of(self, latents_k: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Part by part the image, which of some latents, and value of each of their codes."""
        place_d, begin = np.full(self.d, -1, dtype=np.int32), 0
        place_d[latents_k.numpy()] = np.arange(len(latents_k), dtype=np.int32)
        for latents_m, values_m in self.parts:
            own_m = place_d[latents_m]
            kept_m = np.flatnonzero(own_m >= 0)
            images_m = np.searchsorted(self.offsets_n1, begin + kept_m, side="right") - 1
            yield images_m, own_m[kept_m], values_m[kept_m]
            begin += len(latents_m)

    def _first(self, n: int) -> Codes:
        """The codes of the first n images, in memory."""
        m, begin = int(self.offsets_n1[n]), 0
        latents, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for latents_m, values_m in self.parts:
            latents.append(latents_m[: max(m - begin, 0)])
            values.append(values_m[: max(m - begin, 0)])
            begin += len(latents_m)
        return Codes(
            self.d,
            torch.from_numpy(self.offsets_n1[: n + 1]),
            torch.from_numpy(np.concatenate(latents)),
            torch.from_numpy(np.concatenate(values)),
        )


def _mapped(file: IO[bytes], dtype: type[np.generic]) -> np.ndarray:
    """What was written to a file. It stays when the file is closed."""
    file.flush()
    n = file.tell() // np.dtype(dtype).itemsize
    return np.memmap(file, dtype=dtype, mode="r", shape=(n,)) if n else np.zeros(0, dtype)
