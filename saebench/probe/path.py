"""A linear probe: logistic regression over the whole path of its penalty, the best one taken.

λ is chosen on held rows: from the largest on, each start that of the one before, until their loss
rises; to choose, CHOOSING times the tolerance does. Then all rows are fitted with it, or the others
alone once more.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saebench.probe.curvature import Spectrum
from saebench.probe.logistic import TOLERANCE, solve
from saebench.probe.rows import Rows
from saebench.probe.solution import Solution, scores
from saebench.probe.threads import worthwhile_threads

CHOOSING = 5
RISE = 1.005  # times the least loss of held rows has risen: the fits are too rough to tell less
PENALTIES = tuple(10.0**-i for i in range(8))  # λ: 1 … 1e-7


@dataclass(frozen=True)
class Probe:
    """A linear head over features as they are: logits = x W_dc + b_c, float64.

    penalty: λ. Losses are mean cross-entropies without it, in nat; those of validation are of the
    fit that did not see these rows, which λ was chosen by, NaN where there were none. left: what is
    left to gain of the loss with its penalty. absent: classes without rows.
    """

    W_dc: Tensor
    b_c: Tensor
    penalty: float
    loss_train: float
    accuracy_train: float
    loss_validation: float
    accuracy_validation: float
    converged: bool
    left: float
    evaluations: int
    absent: int


def fit_probe(
    rows: Rows,
    held_n: Tensor,
    n_classes: int,
    *,
    refit: bool = True,
    tolerance: float = TOLERANCE,
) -> Probe:
    """Fit a probe: λ by the rows of held_n [n] bool, then all rows with it.

    refit: whether the held join the last fit; where not, the fit is of the others alone, which
    `loss_train` is then of too. Without held rows there is nothing to choose by: the largest λ.
    """
    with worthwhile_threads(rows, n_classes):
        return _fit(rows, held_n, n_classes, refit, tolerance)


def _fit(rows: Rows, held_n: Tensor, n_classes: int, refit: bool, tolerance: float) -> Probe:
    seen, unseen = rows.where(~held_n), rows.where(held_n)
    best: Solution | None = None
    penalty, loss, accuracy, evaluations = PENALTIES[0], float("nan"), float("nan"), 0
    shared = Spectrum.of(seen if seen.n else rows)
    if seen.n and unseen.n:
        start = None
        for candidate in PENALTIES:
            start = solve(
                seen, n_classes, candidate, start, tolerance=CHOOSING * tolerance, shared=shared
            )
            evaluations += start.evaluations
            found, right = scores(unseen, start)
            if best is None or found < loss:
                best, penalty, loss, accuracy = start, candidate, found, right
            elif found > RISE * loss:
                break
    fitted = rows if refit else seen
    last = solve(fitted, n_classes, penalty, best, tolerance=tolerance, shared=shared)
    evaluations += last.evaluations
    loss_train, accuracy_train = scores(fitted, last)
    W_dc = last.W_dc / rows.scale
    return Probe(
        W_dc,
        last.b_c - rows.mean_d @ W_dc,
        penalty,
        loss_train,
        accuracy_train,
        loss,
        accuracy,
        last.converged,
        last.left,
        evaluations,
        n_classes - len(fitted.y_n.unique()),
    )
