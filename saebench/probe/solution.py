"""What a solver found over scaled rows, and its scores on rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.probe.rows import Rows


@dataclass(frozen=True)
class Solution:
    """A minimum over scaled rows: W_dc and b_c float64.

    loss: with the penalty. left: what is left to gain of it, by the Newton decrement. converged:
    whether that is no more than the tolerance allows.
    """

    W_dc: Tensor
    b_c: Tensor
    loss: float
    left: float
    evaluations: int
    converged: bool


def scores(rows: Rows, fitted: Solution) -> tuple[float, float]:
    """Mean cross-entropy in nat, and the share of rows whose label has the greatest logit."""
    W_dc, b_c = fitted.W_dc.to(rows.dtype), fitted.b_c.to(rows.dtype)
    loss, right = 0.0, 0
    for block in rows.blocks():
        logits_mc = block.times(W_dc).add_(b_c)
        own_m = torch.nn.functional.cross_entropy(logits_mc, block.y_m, reduction="none")
        loss += float(own_m.sum(dtype=torch.float64))
        right += int((logits_mc.argmax(dim=1) == block.y_m).sum())
    return loss / rows.n, right / rows.n
