"""Which latents tell classes apart, from codes as compressed rows: z [n d], never dense.

    η²_j = Σ_c n_c (mean_c z_j − mean z_j)²  /  Σ_n (z_j − mean z_j)²

the share of a latent's variance that lies between classes (ANOVA). Its order is that of the F of
scikit-learn's f_classif. Sums in float64; memory is O(d) and one block of classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CONSTANT = 1e-12  # of Σ z²: a variance below is rounding
DIGITS = 9  # of a share, or a correlation: what is equal to so many is equal

_TABLE = 2**22  # sums held at once, of a block of classes
_BLOCK = 2**22  # codes held at once beside it, and of one image at least


@dataclass(frozen=True, eq=False)
class Moments:
    """Per latent, float64 [d]: the mean, and n times the variance (0 where it is constant)."""

    mean_d: np.ndarray
    spread_d: np.ndarray


def moments(indices_m: Tensor, values_m: Tensor, d: int, n: int) -> Moments:
    """Of all n rows, those without codes too."""
    sum_d, square_d = np.zeros(d), np.zeros(d)
    for own_m, value_m in zip(indices_m.split(_BLOCK), values_m.split(_BLOCK), strict=True):
        index, value = own_m.cpu().numpy(), value_m.cpu().double().numpy()
        sum_d += np.bincount(index, weights=value, minlength=d)
        square_d += np.bincount(index, weights=value * value, minlength=d)
    mean_d = sum_d / max(n, 1)
    spread_d = square_d - sum_d * mean_d
    return Moments(mean_d, np.where(spread_d > CONSTANT * square_d, spread_d, 0.0))


def class_sums(
    offsets_n1: Tensor, indices_m: Tensor, values_m: Tensor, d: int, y_n: Tensor, n_classes: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Σ of z over the rows of each class, float64 [c d]: some successive classes at a time."""
    y = y_n.cpu().numpy()
    start_n, length_n = offsets_n1[:-1].cpu().numpy(), offsets_n1.diff().cpu().numpy()
    index, value = indices_m.cpu().numpy(), values_m.cpu().numpy()
    order_n = np.argsort(y, kind="stable")
    first_c1 = np.searchsorted(y[order_n], np.arange(n_classes + 1))
    size = max(1, _TABLE // max(d, 1))
    for first in range(0, n_classes, size):
        last = min(first + size, n_classes)
        rows = order_n[first_c1[first] : first_c1[last]]
        sums = np.zeros((last - first) * d)
        after = length_n[rows].cumsum()
        begin = 0
        while begin < len(rows):
            done = int(after[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(after, done + _BLOCK, side="right")))
            own = rows[begin:end]
            at_m = _places(start_n[own], length_n[own])
            key_m = np.repeat((y[own] - first) * d, length_n[own]) + index[at_m]
            sums += np.bincount(key_m, weights=value[at_m], minlength=len(sums))
            begin = end
        yield slice(first, last), sums.reshape(last - first, d)


def rank_latents(
    offsets_n1: Tensor, indices_m: Tensor, values_m: Tensor, d: int, y_n: Tensor, n_classes: int
) -> Tensor:
    """[d] int64, the best first. Constant latents are last; of equals the lowest index is first."""
    n = len(y_n)
    found = moments(indices_m, values_m, d, n)
    size_c = np.bincount(y_n.cpu().numpy(), minlength=n_classes)
    between_d = np.zeros(d)
    for classes, sums_cd in class_sums(offsets_n1, indices_m, values_m, d, y_n, n_classes):
        size_c1 = size_c[classes, None]
        apart_cd = sums_cd / np.maximum(size_c1, 1) - found.mean_d
        between_d += (size_c1 * apart_cd**2).sum(axis=0)
    varies_d = found.spread_d > 0
    share_d = np.where(varies_d, between_d / np.where(varies_d, found.spread_d, 1), -1)
    order = torch.from_numpy(np.argsort(-share_d.round(DIGITS), kind="stable"))
    return order.to(offsets_n1.device)


def _places(start_n: np.ndarray, length_n: np.ndarray) -> np.ndarray:
    """Where the codes of some rows are: start, start + 1, … of each, one row after the other."""
    skipped_n = start_n - (length_n.cumsum() - length_n)
    return np.arange(length_n.sum()) + np.repeat(skipped_n, length_n)
