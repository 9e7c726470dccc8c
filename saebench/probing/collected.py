"""What was collected of a sample of train images, as fits read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from saebench.probe_features import Feature, Pooling
from saebench.probing.jobs import What
from saebench.probing.tables import CodesTable, FeatureTable
from saebench.units import Unit

Name = tuple[What, Pooling | None]  # of a unit's tables


@dataclass(frozen=True)
class Asked:
    """A unit, and the feature that its probes read."""

    unit: Unit
    feature: Feature


@dataclass(eq=False)
class Collected:
    """What lies in the store of a sample now.

    present: [m] int64, places in the sample of the images that are there; left_out: a hash of the
    ids of the others, '' where there are none. batch: images in a batch; of each chunk, where
    memory ran out in between. errors: unit -> why nothing was collected for it; missing: unit ->
    `xhat` or `codes` -> why there are none.
    """

    present: np.ndarray
    left_out: str
    batch: int | tuple[int, ...]
    errors: dict[Unit, Exception]
    missing: dict[Unit, dict[str, str]]
    _tables: Mapping[tuple[Unit, Name], Sequence[FeatureTable | CodesTable]]

    def dense(self, asked: Asked, what: Literal["x", "xhat"]) -> list[np.ndarray]:
        """[n_i f] float32 memory maps, m rows in all, in the order of `present`."""
        tables = self._tables[asked.unit, (what, None)]
        return [part for table in tables if isinstance(table, FeatureTable) for part in table.parts]

    def code_parts(self, asked: Asked, pooling: Pooling) -> list[tuple[np.ndarray, np.ndarray]]:
        """(latent int32, value float32) [m_i] memory maps of all values that are not zero."""
        return [part for table in self._codes(asked, pooling) for part in table.parts]

    def offsets(self, asked: Asked, pooling: Pooling) -> np.ndarray:
        """[m+1] int64: where each image's values begin in all `code_parts` put together."""
        counts = [table.counts for table in self._codes(asked, pooling)]
        return np.concatenate([[0], *counts]).cumsum()

    def codes(self, asked: Asked, pooling: Pooling) -> tuple[Tensor, Tensor, Tensor]:
        """(offsets_n1 int64, indices_m int64, values_m float32), all of it in memory."""
        parts = self.code_parts(asked, pooling)
        indices_m = np.concatenate([np.zeros(0, np.int64), *(latent for latent, _ in parts)])
        values_m = np.concatenate([np.zeros(0, np.float32), *(value for _, value in parts)])
        arrays = self.offsets(asked, pooling), indices_m, values_m
        offsets_n1, indices_m, values_m = (torch.from_numpy(array) for array in arrays)
        return offsets_n1, indices_m, values_m

    def _codes(self, asked: Asked, pooling: Pooling) -> list[CodesTable]:
        tables = self._tables[asked.unit, ("codes", pooling)]
        return [table for table in tables if isinstance(table, CodesTable)]
