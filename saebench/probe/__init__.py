"""Multinomial logistic regression with an L2 penalty: what a probing head is fitted by.

    minimise over W [d c], b [c]:   mean over n of −log softmax(x̃ W + b)[y]  +  λ/2 ‖W‖²

x̃ = (x − μ)/s with μ [d] the mean of all rows and one scalar s, the root mean square of x − μ. To
scale each dimension by itself would let the result depend on the axes; this does not, and neither
μ nor the unpenalised b moves the optimum. It is that of scikit-learn's LogisticRegression on x̃ with
C = 1/(λ n). Losses are in nat, sums in float64, and rows go through in chunks.

λ is chosen on every fifth row: from the largest on, each start that of the one before, until their
loss rises. Then all rows are fitted with it. A class without rows has no optimum (its bias would go
to −∞): it gets no weights, and a bias that gives it about the probability 1/n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = tuple(10.0 ** (-i / 2) for i in range(13))  # λ: 1, 0.316, 0.1, … 1e-6
EVERY = 5  # of so many rows, the last is of the validation part
TOLERANCE = 1e-6  # of the loss, that may be left to gain; where λ is being chosen, a hundred times
EVALUATIONS = 2000  # of the loss and its gradient, for one λ at most

_BLOCK = 2**23  # numbers held at once beside the rows


@dataclass(frozen=True)
class Rows:
    """n rows as they are, x_nd of any float dtype, their labels y_n int64, and how they are scaled.

    All on one device.
    """

    x_nd: Tensor
    y_n: Tensor
    mean_d: Tensor
    scale: float

    @classmethod
    def of(cls, x_nd: Tensor, y_n: Tensor) -> Rows:
        """Scaled by their own mean and spread; rows that are all alike are not scaled."""
        mean_d = x_nd.sum(dim=0, dtype=torch.float64) / len(x_nd)
        centred = cls(x_nd, y_n, mean_d, 1.0)
        squares = sum(float(x.square().sum()) for x, _ in centred.chunks(1))
        return cls(x_nd, y_n, mean_d, (squares / x_nd.numel()) ** 0.5 or 1.0)

    def __len__(self) -> int:
        return len(self.y_n)

    def chunks(self, n_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
        """x̃ [· d] float64 and y [·], so many rows at once as are held beside their logits."""
        size = max(1, _BLOCK // max(n_classes, self.x_nd.shape[1]))
        for x_nd, y_n in zip(self.x_nd.split(size), self.y_n.split(size), strict=True):
            own_nd = x_nd.to(torch.float64, copy=True)
            yield own_nd.sub_(self.mean_d).div_(self.scale), y_n

    def chosen(self, which_n: Tensor) -> Rows:
        """Some of the rows, scaled as they all are. which_n: bool."""
        return Rows(self.x_nd[which_n], self.y_n[which_n], self.mean_d, self.scale)


@dataclass(frozen=True)
class Solution:
    """A minimum over scaled rows: W_dc and b_c float64.

    left: what is left to gain of the loss, from above: ‖∂W‖²/2λ by the penalty's convexity, and for
    the biases, which have none, max(c, 1/λ)/2 ‖∂b‖².
    """

    W_dc: Tensor
    b_c: Tensor
    loss: float  # with the penalty
    left: float
    evaluations: int

    def converged(self, tolerance: float = TOLERANCE) -> bool:
        return self.left <= tolerance * self.loss


@dataclass(frozen=True)
class Probe:
    """A linear head over features as they are: logits = x W_dc + b_c, float64.

    penalty: λ. Losses are mean cross-entropies without it; those of validation are of the fit that
    did not see these rows, NaN where there were none.
    """

    W_dc: Tensor
    b_c: Tensor
    penalty: float
    loss_train: float
    accuracy_train: float
    loss_validation: float
    accuracy_validation: float
    converged: bool
    absent: int  # classes without rows


def fit_probe(x_nd: Tensor, y_n: Tensor, n_classes: int) -> Probe:
    """Fit a probe: λ on every fifth row, then all rows with it. y_n: labels 0 … n_classes − 1.

    With less than five rows there is nothing to choose by: the largest λ is taken.
    """
    rows = Rows.of(x_nd, y_n)
    held_n = torch.arange(len(rows), device=y_n.device) % EVERY == EVERY - 1
    seen, unseen = rows.chosen(~held_n), rows.chosen(held_n)
    best: Solution | None = None
    penalty, loss, accuracy = PENALTIES[0], float("nan"), float("nan")
    if len(unseen):
        start = None
        for candidate in PENALTIES:
            start = solve(seen, n_classes, candidate, start, tolerance=100 * TOLERANCE)
            found, right = scores(unseen, start)
            if best is not None and found >= loss:
                break
            best, penalty, loss, accuracy = start, candidate, found, right
    last = solve(rows, n_classes, penalty, best)
    loss_train, accuracy_train = scores(rows, last)
    W_dc = last.W_dc / rows.scale
    return Probe(
        W_dc,
        last.b_c - rows.mean_d @ W_dc,
        penalty,
        loss_train,
        accuracy_train,
        loss,
        accuracy,
        last.converged(),
        n_classes - len(y_n.unique()),
    )


def solve(
    rows: Rows,
    n_classes: int,
    penalty: float,
    start: Solution | None = None,
    tolerance: float = TOLERANCE,
) -> Solution:
    """The minimum for one λ, by L-BFGS, once no more than `tolerance` of the loss is left to gain.

    Where it takes too long, or float64 ends before, what was reached: `Solution.left` says so.
    """
    present = rows.y_n.unique()
    d, c = rows.x_nd.shape[1], len(present)
    own = Rows(rows.x_nd, torch.searchsorted(present, rows.y_n), rows.mean_d, rows.scale)
    point = torch.zeros(d + 1, c, dtype=torch.float64, device=rows.x_nd.device)  # W, then b
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
            known = (point.clone(), *_loss(own, point, penalty))
        _, loss, point.grad = known
        return loss

    loss, before = evaluated(), float("inf")
    while True:
        assert point.grad is not None
        weights, biases = point.grad[:d].square().sum(), point.grad[d].square().sum()
        left = float(weights / penalty + biases * max(c, 1 / penalty)) / 2
        if left <= tolerance * loss or loss >= before or evaluations >= EVALUATIONS:
            break
        before = loss
        optimizer.step(evaluated)
        loss = evaluated()
    W_dc = point.new_zeros(d, n_classes)
    W_dc[:, present] = point[:d]
    b_c = point.new_full((n_classes,), _rare(own, point))
    b_c[present] = point[d]
    return Solution(W_dc, b_c, loss, left, evaluations)


def scores(rows: Rows, fitted: Solution) -> tuple[float, float]:
    """Mean cross-entropy in nat, and the share of rows whose label has the greatest logit."""
    loss, right = 0.0, 0
    for x_nd, y_n in rows.chunks(len(fitted.b_c)):
        logits_nc = torch.addmm(fitted.b_c, x_nd, fitted.W_dc)
        loss += float(torch.nn.functional.cross_entropy(logits_nc, y_n, reduction="sum"))
        right += int((logits_nc.argmax(dim=1) == y_n).sum())
    return loss / len(rows), right / len(rows)


def _loss(rows: Rows, point: Tensor, penalty: float) -> tuple[float, Tensor]:
    """The loss with its penalty, and its gradient [d + 1, c]."""
    W_dc, b_c = point[:-1], point[-1]
    gradient, total = torch.zeros_like(point), point.new_zeros(())
    for x_nd, y_n in rows.chunks(len(b_c)):
        log_nc = torch.addmm(b_c, x_nd, W_dc).log_softmax(dim=1)
        label_n1 = y_n.unsqueeze(1)
        total -= log_nc.gather(1, label_n1).sum()
        slope_nc = log_nc.exp_()  # p − 1 at the label, p elsewhere
        slope_nc.scatter_add_(1, label_n1, slope_nc.new_full((), -1.0).expand(len(y_n), 1))
        gradient[:-1].addmm_(x_nd.T, slope_nc)
        gradient[-1] += slope_nc.sum(dim=0)
    gradient /= len(rows)
    gradient[:-1] += penalty * W_dc
    return float(total / len(rows) + penalty / 2 * W_dc.square().sum()), gradient


def _rare(rows: Rows, point: Tensor) -> float:
    """The bias of a class that no row has: a probability of about 1/n at the mean of the rows."""
    return float(point[-1].logsumexp(0)) - math.log(len(rows))
