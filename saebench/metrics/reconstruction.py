"""How well x̂ stands for x: the raw sums over rows, and the formulas on them (docs/metrics.md).

N rows x_i of width d, x̂_i their reconstruction, r_i = x_i − x̂_i, μ the mean of x over the rows.

    mse                           Σ‖r‖² / (N d)                    act², lower
    mse_per_token                 Σ‖r‖² / N                        act², lower
    fvu                           Σ‖r‖² / Σ‖x − μ‖²                lower; residual not re-centred
    explained_variance            1 − fvu                          higher; never clamped
    cosine                        mean x·x̂ / (‖x‖ ‖x̂‖)             higher; rows of norm 0 left out
    l2_ratio                      mean ‖x̂‖ / ‖x‖                   1 is best; rows x = 0 left out
    relative_reconstruction_bias  Σ‖x̂‖² / Σ x·x̂                    1 is best (arXiv 2404.16014, 10)

Terms of a row are taken in float64 from the float32 activations, row by row, so that they do not
depend on the batch that the row came in. Sums of squares are taken around a pilot mean c: with
y = x − c, Σ‖x − μ‖² = Σ‖y‖² − ‖Σy‖²/N, which does not cancel where the mean of x is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saebench.metrics.sums import Contracted, ImageSums, ratio

TILE_ROWS = 1024  # rows whose float64 copy is held at once: it stays in the cache
ERROR_TERMS = ("sse", "xhat2", "dot", "cosine", "n_cosine", "ratio", "n_ratio")


@dataclass(frozen=True)
class Inputs:
    """What depends on x alone, shared by all SAEs that see it."""

    x2_n: Tensor  # [n] float64 ‖x‖²
    sums: Contracted  # terms: rows, ‖y‖², and the d coordinates of y

    @classmethod
    def of(
        cls, x_btd: Tensor, shift_d: Tensor, kinds: Sequence[slice], weights_br: Tensor
    ) -> Inputs:
        """x [b t d] float32, shift c [d] float64, slices of the t tokens, weights [b R]."""
        b, t, d = x_btd.shape
        x2_bt = x_btd.new_empty(b, t, dtype=torch.float64)
        terms_gbq = x_btd.new_empty(len(kinds), b, d + 2, dtype=torch.float64)
        images = max(1, TILE_ROWS // t)
        for start in range(0, b, images):
            part = slice(start, start + images)
            x = x_btd[part].double()
            x2_bt[part] = squares(x)
            x -= shift_d
            y2 = squares(x)
            for g, kind in enumerate(kinds):
                terms_gbq[g, part, 0] = kind.stop - kind.start
                terms_gbq[g, part, 1] = y2[:, kind].sum(dim=1)
                terms_gbq[g, part, 2:] = x[:, kind].sum(dim=1)
        return cls(x2_bt.flatten(), Contracted.of(terms_gbq, weights_br))


def squares(x: Tensor) -> Tensor:
    """Squared norms over the last dimension."""
    return torch.linalg.vecdot(x, x)


def error_terms(x_nd: Tensor, xhat_nd: Tensor, x2_n: Tensor) -> Tensor:
    """[n q] float64, the terms `ERROR_TERMS` of every row."""
    n = x_nd.shape[0]
    r2_n, xhat2_n = torch.empty_like(x2_n), torch.empty_like(x2_n)
    for start in range(0, n, TILE_ROWS):
        part = slice(start, start + TILE_ROWS)
        xhat = xhat_nd[part].double()
        xhat2_n[part] = squares(xhat)
        r2_n[part] = squares(xhat.sub_(x_nd[part]))
    # ‖x − x̂‖² = ‖x‖² + ‖x̂‖² − 2 x·x̂ gives the product to within rounding of ‖x‖² + ‖x̂‖².
    dot_n = (x2_n + xhat2_n - r2_n) / 2
    has_norm_n = x2_n > 0
    both_n = has_norm_n & (xhat2_n > 0)
    one = x2_n.new_ones(())
    cosine_n = torch.where(both_n, dot_n / torch.where(both_n, x2_n * xhat2_n, one).sqrt(), 0.0)
    ratio_n = (xhat2_n / torch.where(has_norm_n, x2_n, one)).sqrt() * has_norm_n
    return torch.stack([r2_n, xhat2_n, dot_n, cosine_n, both_n, ratio_n, has_norm_n], dim=1)


@dataclass(frozen=True)
class Accumulated:
    """All sums of a group. Scalars have shape [], or [R] for the replicates; y has d beside."""

    n: np.ndarray
    y2: np.ndarray
    y_d: np.ndarray
    sse: np.ndarray
    xhat2: np.ndarray
    dot: np.ndarray
    cosine: np.ndarray
    n_cosine: np.ndarray
    ratio: np.ndarray
    n_ratio: np.ndarray

    @classmethod
    def of(cls, inputs_q: np.ndarray, errors_q: np.ndarray) -> Accumulated:
        """From arrays [… q], the last axis in the order of `Inputs` and `ERROR_TERMS`."""
        named = {name: errors_q[..., i] for i, name in enumerate(ERROR_TERMS)}
        return cls(inputs_q[..., 0], inputs_q[..., 1], inputs_q[..., 2:], **named)

    @classmethod
    def pair(
        cls, inputs: ImageSums, errors: ImageSums, groups: Sequence[int]
    ) -> tuple[Accumulated, Accumulated]:
        """The sums of some groups together: of the sample, and of its replicates."""
        at = list(groups)
        return (
            cls.of(inputs.totals_gq[at].sum(0), errors.totals_gq[at].sum(0)),
            cls.of(inputs.replicates_grq[at].sum(0), errors.replicates_grq[at].sum(0)),
        )

    @property
    def d(self) -> int:
        return self.y_d.shape[-1]

    @property
    def centred(self) -> np.ndarray:
        """Σ‖x − μ‖². What is below rounding of its parts is no variance, and counts as 0."""
        return centred(self.n, self.y2, self.y_d)


def centred(n: np.ndarray, y2: np.ndarray, y_d: np.ndarray) -> np.ndarray:
    """Σ‖y‖² − ‖Σy‖²/N."""
    value = y2 - ratio((y_d * y_d).sum(axis=-1), n)
    return np.where(value <= 1e-12 * y2, 0.0, value)


def mse(s: Accumulated) -> np.ndarray:
    return ratio(s.sse, s.n * s.d)


def mse_per_token(s: Accumulated) -> np.ndarray:
    return ratio(s.sse, s.n)


def fvu(s: Accumulated) -> np.ndarray:
    return ratio(s.sse, s.centred)


def explained_variance(s: Accumulated) -> np.ndarray:
    return 1 - fvu(s)


def cosine(s: Accumulated) -> np.ndarray:
    return ratio(s.cosine, s.n_cosine)


def l2_ratio(s: Accumulated) -> np.ndarray:
    return ratio(s.ratio, s.n_ratio)


def relative_reconstruction_bias(s: Accumulated) -> np.ndarray:
    return ratio(s.xhat2, s.dot)
