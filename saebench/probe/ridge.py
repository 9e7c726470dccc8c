"""Ridge regression of classes, in closed form: the quick alternative to logistic regression.

    minimise over W [d c], b [c]:   mean over n of ‖x̃ W + b − t‖²  +  λ ‖W‖²
    W = (XᵀX/n + λ)⁻¹ Xᵀt/n

x̃ are scaled rows (saebench.probe.rows), X the n of them less their own mean; t is 1 for the row's
class and −1 for the others. It is scikit-learn's RidgeClassifier on x̃ with alpha = λ n: the class
is the greatest of x̃ W + b. Rows are read once; every λ of the path then costs one Cholesky factor
[d d], which for eight of them is less than one eigendecomposition. All in float64.

λ is that of the best accuracy on held rows, of equals the largest. A class without rows gets no
weights and the bias −1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from saebench.probe.path import PENALTIES, Probe
from saebench.probe.rows import Block, DenseBlock, Rows

WIDEST = 4096  # features: XᵀX of more takes too much memory, and its factors minutes

_BLOCK = 1024  # rows that are float64 at once


@dataclass(frozen=True, eq=False)
class _Sums:
    """Over n rows: Σ x̃ [d], Σ x̃ᵀx̃ [d d], Σ x̃ of each class [d c], and their numbers."""

    n: int
    sum_d: Tensor
    gram_dd: Tensor
    class_dc: Tensor
    count_c: Tensor

    @classmethod
    def of(cls, rows: Rows, n_classes: int) -> _Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=rows.device)

        sum_d, gram_dd, class_dc = zeros(rows.d), zeros(rows.d, rows.d), zeros(rows.d, n_classes)
        count_c = zeros(n_classes)
        for block in rows.blocks():
            features = _features(block, rows).split(_BLOCK)
            for some_md, y_m in zip(features, block.y_m.split(_BLOCK), strict=True):
                x_md, own_mc = some_md.double(), one_hot(y_m, n_classes).double()
                sum_d += x_md.sum(dim=0)
                gram_dd.addmm_(x_md.T, x_md)
                class_dc.addmm_(x_md.T, own_mc)
                count_c += own_mc.sum(dim=0)
        return cls(rows.n, sum_d, gram_dd, class_dc, count_c)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.n + other.n,
            self.sum_d + other.sum_d,
            self.gram_dd + other.gram_dd,
            self.class_dc + other.class_dc,
            self.count_c + other.count_c,
        )

    def solved(self, penalty: float) -> tuple[Tensor, Tensor]:
        """W [d c] and b [c] for scaled rows."""
        mean_d, target_c = self.sum_d / self.n, 2 * self.count_c / self.n - 1
        # Σ X t = 2 Σ X over the class − Σ X, and Σ X = 0
        apart_dc = 2 * (self.class_dc - torch.outer(mean_d, self.count_c)) / self.n
        normal_dd = torch.addr(self.gram_dd / self.n, mean_d, mean_d, alpha=-1)
        normal_dd.diagonal().add_(penalty)
        W_dc = torch.cholesky_solve(apart_dc, torch.linalg.cholesky(normal_dd))
        return W_dc, target_c - mean_d @ W_dc


def fit_ridge(rows: Rows, held_n: Tensor, n_classes: int, *, refit: bool = True) -> Probe:
    """Fit a probe: λ by the rows of held_n [n] bool, then all rows with it.

    refit: whether the held join the last fit. Without held rows, or without others, there is
    nothing to choose by: the largest λ, on all rows. Losses are NaN, for there are no
    probabilities. Errors: ValueError for more than WIDEST features.
    """
    if rows.d > WIDEST:
        raise ValueError(f"ridge regression of {rows.d} features; it takes {WIDEST} at most")
    seen, unseen = rows.where(~held_n), rows.where(held_n)
    sums, rest = _Sums.of(seen, n_classes), _Sums.of(unseen, n_classes)
    penalty, accuracy = PENALTIES[0], float("nan")
    if seen.n and unseen.n:
        fits = [sums.solved(candidate) for candidate in PENALTIES]
        right = _right(unseen, fits)
        best = right.index(max(right))
        penalty, accuracy = PENALTIES[best], right[best] / unseen.n
    whole = refit or not seen.n
    W_dc, b_c = (sums + rest if whole else sums).solved(penalty)
    fitted = rows if whole else seen
    accuracy_train = _right(fitted, [(W_dc, b_c)])[0] / fitted.n
    raw_dc = W_dc / rows.scale
    return Probe(
        raw_dc,
        b_c - rows.mean_d @ raw_dc,
        penalty,
        loss_train=float("nan"),
        accuracy_train=accuracy_train,
        loss_validation=float("nan"),
        accuracy_validation=accuracy,
        converged=True,
        left=0.0,
        evaluations=0,
        absent=n_classes - len(fitted.y_n.unique()),
    )


def _features(block: Block, rows: Rows) -> Tensor:
    """x̃ [m d]."""
    if isinstance(block, DenseBlock):
        return block.x_md
    return block.times(torch.eye(rows.d, dtype=rows.dtype, device=rows.device))


def _right(rows: Rows, fits: list[tuple[Tensor, Tensor]]) -> list[int]:
    """How many rows each of some fits gets right."""
    fits = [(W_dc.to(rows.dtype), b_c.to(rows.dtype)) for W_dc, b_c in fits]
    right = [0] * len(fits)
    for block in rows.blocks():
        for i, (W_dc, b_c) in enumerate(fits):
            found_m = block.times(W_dc).add_(b_c).argmax(dim=1)
            right[i] += int((found_m == block.y_m).sum())
    return right
