"""Steers a sparsity penalty so that the mean L0 arrives at its target.

The aim falls geometrically from the first L0 seen to the target over the first `ANNEAL` of the
steps, so that the coefficient never winds up while the SAE is still dense. With
e = log(smoothed L0 / aim), a PI controller in the logarithm:

    log λ_I += GAIN·clip(e, ±1) each step,        λ = exp(log λ_I + PROPORTIONAL·clip(e, ±1))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ANNEAL = 0.4
GAIN = 0.03
PROPORTIONAL = 0.5
SMOOTHING = 0.9  # of the L0, a moving average over about ten batches
START = 1e-2  # λ of the first step, where the aim is what the SAE has


@dataclass
class Controller:
    """The coefficient λ of one SAE. All of its state is three floats, saved in checkpoints."""

    target: float
    log_coefficient: float = math.log(START)
    first: float = 0.0
    smoothed: float = 0.0

    def coefficient(self, l0: float, progress: float) -> float:
        """λ for this step, from this batch's mean L0; `progress` is the share of steps done."""
        if not self.first:
            self.first = self.smoothed = max(l0, self.target)
        self.smoothed += (1 - SMOOTHING) * (l0 - self.smoothed)
        aim = self.target * (self.first / self.target) ** max(0.0, 1 - progress / ANNEAL)
        error = math.log(max(self.smoothed, 1e-3) / aim)
        error = min(max(error, -1.0), 1.0)
        self.log_coefficient += GAIN * error
        return math.exp(self.log_coefficient + PROPORTIONAL * error)

    def state(self) -> dict[str, float]:
        return {
            "log_coefficient": self.log_coefficient,
            "first": self.first,
            "smoothed": self.smoothed,
        }

    def restore(self, state: dict[str, float]) -> None:
        self.log_coefficient = state["log_coefficient"]
        self.first, self.smoothed = state["first"], state["smoothed"]
