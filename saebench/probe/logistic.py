"""Multinomial logistic regression with an L2 penalty, at its optimum.

    minimise over W [d c], b [c]:   mean over n of −log softmax(x̃ W + b)[y]  +  λ/2 ‖W‖²

x̃ are scaled rows (saebench.probe.rows); the optimum is that of scikit-learn's LogisticRegression on
x̃ with C = 1/(λ n). Losses are in nat, sums of them in float64. A class without rows has no optimum
(its bias would go to −∞): it gets no weights, and a bias that gives it about the probability 1/n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.probe.rows import Rows

TOLERANCE = 1e-4  # of the loss, that may be left to gain
EVALUATIONS = 2000  # of the loss and its gradient, for one λ at most


@dataclass(frozen=True)
class Solution:
    """A minimum over scaled rows: W_dc and b_c float64.

    loss: with the penalty. left: what is left to gain of it.
    """

    W_dc: Tensor
    b_c: Tensor
    loss: float
    left: float
    evaluations: int
    converged: bool


def solve(
    rows: Rows,
    n_classes: int,
    penalty: float,
    start: Solution | None = None,
    *,
    tolerance: float = TOLERANCE,
    shared: object = None,
) -> Solution:
    """The minimum for one λ, by L-BFGS, once no more than `tolerance` of the loss is left to gain.

    Where it takes too long, or the numbers' precision ends before, what was reached.
    """
    y_n = rows.y_n
    present = y_n.unique()
    c = len(present)
    place_c = torch.zeros(n_classes, dtype=torch.int64, device=rows.device)
    place_c[present] = torch.arange(c, device=rows.device)
    point = torch.zeros(rows.d + 1, c, dtype=torch.float64, device=rows.device)  # W, then b
    if start is not None:
        point = torch.cat([start.W_dc, start.b_c.unsqueeze(0)])[:, present].contiguous()
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=5,  # then it is seen how far it has come
        max_eval=20,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0
    known: tuple[Tensor, float, Tensor] | None = None  # where it was evaluated last, and what came

    def evaluated() -> float:
        nonlocal evaluations, known
        if known is None or not torch.equal(known[0], point):
            evaluations += 1
            known = (point.clone(), *_loss(rows, place_c, point, penalty))
        _, loss, point.grad = known
        return loss

    loss, before = evaluated(), float("inf")
    while True:
        assert point.grad is not None
        weights, biases = point.grad[:-1].square().sum(), point.grad[-1].square().sum()
        left = float(weights / penalty + biases * max(c, 1 / penalty)) / 2
        if left <= tolerance * loss or loss >= before or evaluations >= EVALUATIONS:
            break
        before = loss
        optimizer.step(evaluated)
        loss = evaluated()
    W_dc = point.new_zeros(rows.d, n_classes)
    W_dc[:, present] = point[:-1]
    rare = float(point[-1].logsumexp(0)) - math.log(rows.n)
    b_c = point.new_full((n_classes,), rare)
    b_c[present] = point[-1]
    return Solution(W_dc, b_c, loss, left, evaluations, left <= tolerance * loss)


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


def _loss(rows: Rows, place_c: Tensor, point: Tensor, penalty: float) -> tuple[float, Tensor]:
    """The loss with its penalty, and its gradient [d + 1, c]."""
    W_dc, b_c = point[:-1].to(rows.dtype), point[-1].to(rows.dtype)
    gradient, total = torch.zeros_like(point), point.new_zeros(())
    for block in rows.blocks():
        log_mc = block.times(W_dc).add_(b_c).log_softmax(dim=1)
        label_m1 = place_c[block.y_m].unsqueeze(1)
        total -= log_mc.gather(1, label_m1).sum(dtype=torch.float64)
        slope_mc = log_mc.exp_()  # p − 1 at the label, p elsewhere
        slope_mc.scatter_add_(1, label_m1, slope_mc.new_full((), -1.0).expand(len(label_m1), 1))
        gradient[:-1] += block.transposed_times(slope_mc)
        gradient[-1] += slope_mc.sum(dim=0, dtype=torch.float64)
    gradient /= rows.n
    gradient[:-1] += penalty * point[:-1]
    return float(total / rows.n + penalty / 2 * point[:-1].square().sum()), gradient
