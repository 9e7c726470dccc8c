"""Probes as scikit-learn fits them, run to their optimum, and their scores: plain and slow."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
AS_GOOD = 3e-3  # of a loss of held rows: what optima to 1e-4 can differ by


@dataclass(frozen=True)
class Linear:
    """A probe that reads raw features: logits = (x − mean)/scale W + b."""

    mean_d: np.ndarray
    scale: float
    model: Any
    penalty: float

    def logits(self, x_nd: np.ndarray) -> np.ndarray:
        return logits_of(self.model, (x_nd - self.mean_d) / self.scale)


def fit(
    x_nd: np.ndarray,
    y_n: np.ndarray,
    held_n: np.ndarray,
    stated: float | None = None,
    *,
    refit: bool = True,
) -> Linear:
    """λ from the largest on until the held rows' loss rises, then all rows with the best.

    stated: another's choice, which is taken where its held rows' loss is as good. refit: whether
    the held rows join the last fit.
    """
    mean_d = x_nd.mean(0)
    scale = float(np.sqrt(((x_nd - mean_d) ** 2).mean())) or 1.0
    x_nd = (x_nd - mean_d) / scale
    assert set(y_n[~held_n]) == set(range(y_n.max() + 1))
    model = LogisticRegression(max_iter=20_000, warm_start=True)
    losses: dict[float, float] = {}
    for penalty in PENALTIES:
        to_optimum(model, x_nd[~held_n], y_n[~held_n], penalty)
        losses[penalty] = cross_entropy(logits_of(model, x_nd[held_n]), y_n[held_n])
        if losses[penalty] > min(losses.values()) and stated in (None, *losses):
            break
    chosen = min(losses, key=losses.__getitem__) if stated is None else stated
    assert losses[chosen] <= min(losses.values()) * (1 + AS_GOOD), f"{chosen} of {losses}"
    last_n = ~held_n | refit
    to_optimum(model, x_nd[last_n], y_n[last_n], chosen)
    return Linear(mean_d, scale, model, chosen)


def to_optimum(
    model: LogisticRegression, x_nd: np.ndarray, y_n: np.ndarray, penalty: float
) -> None:
    """What is left of the loss is no more than |gradient|²/2λ, and the loss falls with λ too."""
    model.set_params(C=1 / (penalty * len(y_n)), tol=min(3e-6, 3e-3 * penalty)).fit(x_nd, y_n)


def logits_of(model: LogisticRegression, x_nd: np.ndarray) -> np.ndarray:
    logits_nc = model.decision_function(x_nd)
    if logits_nc.ndim == 1:  # of two classes scikit-learn has one weight: the other's is 0
        logits_nc = np.stack([0 * logits_nc, logits_nc], axis=1)
    return logits_nc


def log_softmax(logits_nc: np.ndarray) -> np.ndarray:
    logits_nc = logits_nc - logits_nc.max(1, keepdims=True)
    return logits_nc - np.log(np.exp(logits_nc).sum(1, keepdims=True))


def cross_entropy(logits_nc: np.ndarray, y_n: np.ndarray) -> float:
    return float(-log_softmax(logits_nc)[np.arange(len(y_n)), y_n].mean())


def macro(right_n: np.ndarray, y_n: np.ndarray) -> float:
    return float(np.mean([right_n[y_n == label].mean() for label in np.unique(y_n)]))


def scores(logits_nc: np.ndarray, y_n: np.ndarray) -> dict[str, float]:
    own_n = logits_nc[np.arange(len(y_n)), y_n]
    rank_n = (logits_nc > own_n[:, None]).sum(1)
    return {
        "": float((rank_n == 0).mean()),
        "_top5": float((rank_n < 5).mean()),
        "_macro": macro(rank_n == 0, y_n),
        "loss": cross_entropy(logits_nc, y_n),
    }


def level_scores(logits_nc: np.ndarray, y_n: np.ndarray, level_c: np.ndarray) -> dict[str, float]:
    """Of a higher level: its probabilities are sums over its classes."""
    p_nc = np.exp(log_softmax(logits_nc))
    p_nl = np.stack([p_nc[:, level_c == value].sum(1) for value in range(level_c.max() + 1)], 1)
    own_n = p_nl[np.arange(len(y_n)), level_c[y_n]]
    right_n = (p_nl > own_n[:, None]).sum(1) == 0
    return {"": float(right_n.mean()), "loss": float(-np.log(own_n).mean())}


def ranking(z_ns: np.ndarray, y_n: np.ndarray) -> np.ndarray:
    """Latents by f_classif, the best first; constant ones last."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant latents
        f_s = f_classif(z_ns, y_n)[0]
    return np.argsort(-np.where(np.ptp(z_ns, axis=0) > 0, f_s, -1), kind="stable")


def one_latent(z_n: np.ndarray, own_n: np.ndarray) -> tuple[float, np.ndarray]:
    """CE on train rows of σ(a z + b), and (a, b)."""
    sign_n, s = np.where(own_n, -1, 1), z_n.std() or 1.0

    def loss(at: np.ndarray) -> float:
        return float(np.logaddexp(0, sign_n * (at[0] * z_n / s + at[1])).mean())

    p = own_n.mean()
    best = minimize(lambda at: loss(at) + 5e-7 * at[0] ** 2, [0, np.log(p / (1 - p))], tol=1e-10)
    return loss(best.x), best.x / [s, 1]
