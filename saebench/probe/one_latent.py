"""Many 1-D logistic regressions at once, each of a class on a sparse latent, by Newton's method.

    f(a, b) = mean over n of CE(σ(a x + b), y = c)  +  RIDGE/2 a²,        x = z/s

f is convex and has two unknowns, so that a step needs two first and three second derivatives. A
step that does not lower f is halved. Rows without a code are all alike and counted, not visited:
an evaluation costs the codes of the latents. float64, on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

RIDGE = 1e-6
EVALUATIONS = 200  # of one fit at most
GAIN = 1e-10  # nat: where the next step promises less, a fit is done
SMALLEST = 1e-6  # share of a step: where none lowers f, rounding is all that is left
FULL = 0.75  # where fewer of the fits are still going, the others are no longer visited
TINY = 1e-12  # on the second derivative by b, which vanishes where all is certain


@dataclass(frozen=True, eq=False)
class Fits:
    """p fits side by side, the m codes of one after those of the other; each has one at least."""

    n: int
    x_m: np.ndarray
    sign_m: np.ndarray  # −1 where the row is of the class, else 1
    length_p: np.ndarray  # codes of each
    silent_p: np.ndarray  # rows without a code
    silent_class_p: np.ndarray  # of them those of the class
    size_p: np.ndarray  # rows of the class

    @classmethod
    def of(
        cls,
        columns: Any,
        y_n: np.ndarray,
        class_p: np.ndarray,
        latent_p: np.ndarray,
        scale_p: np.ndarray,
    ) -> Fits:
        """columns: the codes by latent, a scipy csc_matrix [n d]. scale: s of each fit's latent."""
        length_p = np.diff(columns.indptr)[latent_p].astype(np.int64)
        start_p = length_p.cumsum() - length_p
        first_p = columns.indptr[latent_p].astype(np.int64)
        at_m = np.arange(length_p.sum()) + np.repeat(first_p - start_p, length_p)
        own_m = y_n[columns.indices[at_m]] == np.repeat(class_p, length_p)
        size_c = np.bincount(y_n, minlength=int(class_p.max(initial=0)) + 1)
        size_p = size_c[class_p]
        return cls(
            len(y_n),
            columns.data[at_m] / np.repeat(scale_p, length_p),
            np.where(own_m, -1.0, 1.0),
            length_p,
            len(y_n) - length_p,
            size_p - np.add.reduceat(own_m, start_p, dtype=np.int64),
            size_p,
        )

    def solve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """a, b and the CE alone, without the ridge: each [p]."""
        share_p = self.size_p / self.n
        found_3p = np.zeros((3, len(share_p)))
        at_2p = np.stack([np.zeros(len(share_p)), np.log(share_p) - np.log1p(-share_p)])
        here, whose_p = self, np.arange(len(share_p))
        known = here.derivatives(*at_2p)
        step_2p, gain_p = _newton(known)
        size_p = np.ones(len(share_p))
        for _ in range(EVALUATIONS):
            trial_2p = at_2p + size_p * step_2p
            new = here.derivatives(*trial_2p)
            better_p = _objective(new, trial_2p) <= _objective(known, at_2p)
            at_2p = np.where(better_p, trial_2p, at_2p)
            known = tuple(np.where(better_p, a, b) for a, b in zip(new, known, strict=True))
            step_2p, gain_p = _newton(known)
            size_p = np.where(better_p, 1.0, size_p / 2)
            found_3p[:, whose_p] = *at_2p, known[0]
            going_p = (gain_p > GAIN) & (size_p > SMALLEST)
            if not going_p.any():
                break
            if going_p.mean() < FULL:
                here, whose_p, size_p = here.only(going_p), whose_p[going_p], size_p[going_p]
                at_2p, step_2p = at_2p[:, going_p], step_2p[:, going_p]
                known = tuple(part[going_p] for part in known)
        return found_3p[0], found_3p[1], found_3p[2]

    def only(self, keep_p: np.ndarray) -> Fits:
        """Some of the fits."""
        keep_m = np.repeat(keep_p, self.length_p)
        rest = (self.length_p, self.silent_p, self.silent_class_p, self.size_p)
        return Fits(self.n, self.x_m[keep_m], self.sign_m[keep_m], *(part[keep_p] for part in rest))

    def derivatives(self, a_p: np.ndarray, b_p: np.ndarray) -> tuple[np.ndarray, ...]:
        """CE [p], and of f: by a, by b, by aa, ab, bb."""
        start_p = self.length_p.cumsum() - self.length_p

        def mean(of_m: torch.Tensor) -> np.ndarray:
            return np.add.reduceat(of_m.numpy(), start_p) / self.n

        x_m, sign_m = torch.from_numpy(self.x_m), torch.from_numpy(self.sign_m)
        u_m = torch.from_numpy(np.repeat(a_p, self.length_p)).mul_(x_m)
        u_m += torch.from_numpy(np.repeat(b_p, self.length_p))
        u_m *= sign_m
        wrong_m = u_m.sigmoid()  # 1 − the probability of what it is
        curve_m = wrong_m * (1 - wrong_m)
        slope_m = wrong_m.mul_(sign_m)
        bias_p = torch.from_numpy(b_p)
        silent_p = bias_p.sigmoid().numpy()
        share_p, class_p = self.silent_p / self.n, self.silent_class_p / self.n
        ce_p = -mean(logsigmoid(-u_m)) + share_p * -logsigmoid(-bias_p).numpy() - class_p * b_p
        by_b = mean(slope_m) + share_p * silent_p - class_p
        by_bb = mean(curve_m) + share_p * silent_p * (1 - silent_p)
        by_a = mean(slope_m.mul_(x_m)) + RIDGE * a_p
        by_ab = mean(curve_m.mul_(x_m))
        by_aa = mean(curve_m.mul_(x_m)) + RIDGE
        return ce_p, by_a, by_b, by_aa, by_ab, by_bb


def _objective(known: tuple[np.ndarray, ...], at_2p: np.ndarray) -> np.ndarray:
    return known[0] + RIDGE / 2 * at_2p[0] ** 2


def _newton(known: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The step [2 p], and what it promises of f [p]."""
    _, by_a, by_b, by_aa, by_ab, by_bb = known
    by_bb = by_bb + TINY
    determinant_p = by_aa * by_bb - by_ab**2
    a_p = -(by_bb * by_a - by_ab * by_b) / determinant_p
    b_p = -(by_aa * by_b - by_ab * by_a) / determinant_p
    return np.stack([a_p, b_p]), -(a_p * by_a + b_p * by_b) / 2
