"""The loss of a linear probe over rows, its gradient, and how the rows doubt.

    f(W, b) = mean over n of −log softmax(x̃ W + b)[y]  +  λ/2 ‖W‖²

A point is W and, as its last row, b: [d + 1, c], over the c classes that have rows. p are the
probabilities of a row, and p_k (1 − p_k) its doubt of class k: the weight that it has in the
Hessian of that class's weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.probe.rows import DenseBlock, Rows

CHOSEN = 4096  # rows that doubt most
ENOUGH = 0.995  # of all doubt: then fewer do


@dataclass(frozen=True, eq=False)
class Value:
    """f at a point and its gradient [d + 1, c].

    doubt_c, doubt_n: the mean doubt of each class, and the doubts of each row added up; None where
    they were not asked for.
    """

    loss: float
    gradient: Tensor
    doubt_c: Tensor | None = None
    doubt_n: Tensor | None = None


class Objective:
    """Of one set of rows. present: the classes that have some. spent: passes over n_all rows."""

    def __init__(self, rows: Rows, present: Tensor, n_classes: int, n_all: int) -> None:
        self.rows, self.present, self.n_classes, self.n_all = rows, present, n_classes, n_all
        self.spent = 0.0
        self.place_c = torch.zeros(n_classes, dtype=torch.int64, device=rows.device)
        self.place_c[present] = torch.arange(len(present), device=rows.device)

    def of(self, rows: Rows) -> Objective:
        """The same of other rows."""
        return Objective(rows, self.present, self.n_classes, self.n_all)

    def at(
        self, point: Tensor, penalty: float, *, doubts: bool = False, coarse: bool = False
    ) -> Value:
        """doubts: say them too. coarse: with products of bfloat16, where the rows are dense."""
        rows, W_dc, b_c = self.rows, point[:-1], point[-1]
        self.spent += rows.n / self.n_all
        low_dc = W_dc.bfloat16() if coarse else W_dc
        gradient, doubt_c, doubt_n = torch.zeros_like(point), torch.zeros_like(b_c), []
        total = torch.zeros((), dtype=torch.float64, device=point.device)
        for block in rows.blocks():
            low = coarse and isinstance(block, DenseBlock)
            log_mc = block.times(low_dc if low else W_dc).to(W_dc.dtype).add_(b_c)
            torch.log_softmax(log_mc, dim=1, out=log_mc)
            label_m1 = self.place_c[block.y_m].unsqueeze(1)
            own_m1 = log_mc.gather(1, label_m1)
            p_mc = log_mc.exp_()
            if doubts:
                doubt_mc = p_mc - p_mc.square()
                doubt_c += doubt_mc.sum(dim=0)
                doubt_n.append(doubt_mc.sum(dim=1))
            p_mc.scatter_(1, label_m1, 0.0)
            other_m1 = p_mc.sum(dim=1, keepdim=True)  # 1 − p of the label, without its rounding
            sure_m1 = -torch.log1p(-other_m1.clamp_max(0.5))
            total += torch.where(other_m1 < 0.5, sure_m1, -own_m1).sum(dtype=torch.float64)
            slope_mc = p_mc.scatter_(1, label_m1, -other_m1)
            gradient[:-1] += block.transposed_times(slope_mc.bfloat16() if low else slope_mc)
            gradient[-1] += slope_mc.sum(dim=0)
        gradient /= rows.n
        gradient[:-1].add_(W_dc, alpha=penalty)
        loss = float(total) / rows.n + penalty / 2 * square(W_dc)
        if not doubts:
            return Value(loss, gradient)
        least = 1e-3 / rows.n  # a class of which all rows are sure bends no less
        return Value(loss, gradient, (doubt_c / rows.n).clamp_min_(least), torch.cat(doubt_n))

    def logits(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """[n c] of few rows, and the place of each row's label [n 1]."""
        self.spent += self.rows.n / self.n_all / 2
        blocks = [
            (block.times(point[:-1]).add_(point[-1]), block.y_m) for block in self.rows.blocks()
        ]
        labels_n = torch.cat([y_m for _, y_m in blocks])
        return torch.cat([logits_mc for logits_mc, _ in blocks]), self.place_c[labels_n].unsqueeze(
            1
        )

    def stretched(self, point: Tensor, penalty: float) -> tuple[Tensor, float]:
        """The point times the factor that makes the loss least, and that loss: for few rows."""
        logits_nc, label_n1 = self.logits(point)
        own_n1, weights2 = logits_nc.gather(1, label_n1), square(point[:-1])

        def loss(factor: float) -> float:
            sums_n = (logits_nc * factor).logsumexp(dim=1)
            own = float((sums_n - factor * own_n1.squeeze(1)).mean(dtype=torch.float64))
            return own + penalty / 2 * factor**2 * weights2

        low, high = -2.0, 2.0  # of the factor's logarithm
        for _ in range(10):
            middle = (low + high) / 2
            factor = math.exp(middle)
            p_nc = (logits_nc * factor).softmax(dim=1)
            own = float((p_nc * logits_nc).sum(dim=1).mean() - own_n1.mean())
            low, high = (low, middle) if own + penalty * factor * weights2 > 0 else (middle, high)
        least, factor = min((loss(factor), factor) for factor in (1.0, math.exp((low + high) / 2)))
        return point * factor, least


def doubting(doubt_n: Tensor) -> Tensor:
    """Places of the rows that doubt most, ascending: no more than CHOSEN."""
    most_m, place_m = doubt_n.topk(min(CHOSEN, len(doubt_n)))
    enough = int((most_m.double().cumsum(0) < ENOUGH * doubt_n.sum(dtype=torch.float64)).sum()) + 1
    return place_m[: max(enough, min(64, len(place_m)))].sort().values


def dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def square(a: Tensor) -> float:
    return dot(a, a)
