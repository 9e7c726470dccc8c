"""Σ‖e − ē‖² over the vectors of images, where nothing is known of their mean beforehand.

Sums are taken around a pilot c, a vector of the data itself: with y = e − c,
Σ‖e − ē‖² = Σ‖y‖² − ‖Σy‖²/N, which does not cancel where the mean is large. Two stretches with
pilots a and b are merged by moving the later one: with δ = b − a,

    Σ‖e − a‖² = Σ‖e − b‖² + 2 δ·Σ(e − b) + N‖δ‖²,     Σ(e − a) = Σ(e − b) + N δ

d width of a vector, R bootstrap replicates, in each of which an image has its weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from saebench.metrics.reconstruction import centred
from saebench.metrics.sums import Contracted


def spread_terms(vectors_bd: Tensor, pilot_d: Tensor, weights_br: Tensor) -> Contracted:
    """Sums of (1, ‖y‖², y) over b vectors and each replicate: what `Spread.add` takes."""
    y_bd = vectors_bd.double() - pilot_d.double()
    ones_b1 = torch.ones_like(y_bd[:, :1])
    squares_b1 = torch.linalg.vecdot(y_bd, y_bd).unsqueeze(1)
    return Contracted.of(torch.cat([ones_b1, squares_b1, y_bd], dim=1).unsqueeze(0), weights_br)


class Spread:
    """A `Part`: N, Σ‖y‖² and Σy around a pilot, of the sample and of every replicate."""

    def __init__(self) -> None:
        self.pilot_d = np.zeros(0)
        self.totals_q = np.zeros(0)  # [2 + d], as `spread_terms` orders them
        self.replicates_rq = np.zeros((0, 0))

    def add(self, pilot_d: np.ndarray, terms: Contracted) -> None:
        """Add sums that were taken around `pilot_d` [d] float64."""
        totals_q, replicates_rq = terms.totals_gq[0], terms.replicates_grq[0]
        if not self.pilot_d.size:
            self.pilot_d, self.totals_q = pilot_d.copy(), totals_q.copy()
            self.replicates_rq = replicates_rq.copy()
            return
        if not np.array_equal(pilot_d, self.pilot_d):
            delta_d = pilot_d - self.pilot_d
            totals_q, replicates_rq = moved(totals_q, delta_d), moved(replicates_rq, delta_d)
        self.totals_q += totals_q
        self.replicates_rq += replicates_rq

    @property
    def n(self) -> int:
        return int(self.totals_q[0]) if self.totals_q.size else 0

    def centred(self) -> tuple[np.ndarray, np.ndarray]:
        """Σ‖e − ē‖² of the sample, [], and of the replicates, [R]."""
        return _centred(self.totals_q), _centred(self.replicates_rq)

    def state(self) -> dict[str, np.ndarray]:
        return {
            "pilot": self.pilot_d,
            "totals": self.totals_q,
            "replicates": self.replicates_rq,
        }

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        if state["pilot"].size:
            terms = Contracted(state["totals"][None], state["replicates"][None])
            self.add(state["pilot"], terms)


def moved(sums_q: np.ndarray, delta_d: np.ndarray) -> np.ndarray:
    """Sums [… 2 + d] around a + δ as sums around a."""
    n, y2, y_d = sums_q[..., :1], sums_q[..., 1:2], sums_q[..., 2:]
    along = (y_d @ delta_d)[..., None]
    y2 = y2 + 2 * along + n * (delta_d @ delta_d)
    return np.concatenate([n, y2, y_d + n * delta_d], axis=-1)


def _centred(sums_q: np.ndarray) -> np.ndarray:
    return centred(sums_q[..., 0], sums_q[..., 1], sums_q[..., 2:])
