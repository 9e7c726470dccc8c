"""The peers' formulas that derive from sums over rows, each under its project's name.

Equal names mean different numbers in this field: a row `explained_variance` with
convention = "saebench" is what that project's code would print for these activations. Formulas
that depend on how a project cuts its batches are not here. docs/conventions.md lists them.

N rows x of width d with error r and codes z. Where a project divides by something that is 0, the
value is undefined (NaN here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saebench.metrics.latents import Firings, sum_by
from saebench.metrics.reconstruction import TILE_ROWS, centred
from saebench.metrics.sums import defined, ratio

Formula = Callable[["Peers"], float]


def peer_terms(x_nd: Tensor, xhat_nd: Tensor, shift_d: Tensor) -> dict[str, Tensor]:
    """Sums over the rows of one token kind, float64; the names are the fields of `Peers`."""
    n, d = x_nd.shape
    total = {
        name: x_nd.new_zeros(size, dtype=torch.float64) for name, size in peer_shapes(d).items()
    }
    total["n"] += n
    for x, xhat in zip(x_nd.split(TILE_ROWS), xhat_nd.split(TILE_ROWS), strict=True):
        x, xhat = x.double(), xhat.double()
        r, y = x - xhat, x - shift_d
        x2, r2 = (x * x).sum(1), (r * r).sum(1)
        spread_x = x2 - x.sum(1).square() / d  # ‖x − x̄‖², x̄ the mean of the row's coordinates
        spread_r = r2 - r.sum(1).square() / d
        total["x2"] += x2.sum()
        total["sse"] += r2.sum()
        total["x_d"] += x.sum(0)
        total["y_d"] += y.sum(0)
        total["y2_d"] += (y * y).sum(0)
        total["r_d"] += r.sum(0)
        total["r2_d"] += (r * r).sum(0)
        total["r_norm"] += r2.sqrt().sum()
        total["r2_by_x2"] += (r2 / x2).sum()
        total["r2_by_spread"] += (r2 / spread_x).sum()
        total["spread_by_spread"] += (spread_r / spread_x).sum()
        total["r2_by_norm"] += (r2 / x2.sqrt()).sum()
    return total


def peer_shapes(d: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the sums that `peer_terms` makes."""
    return {name: (d,) if name.endswith("_d") else () for name in Peers.__dataclass_fields__}


@dataclass(frozen=True)
class Peers:
    """The raw sums of a group, c being the shift: n, Σ‖x‖², Σ‖r‖², Σx, Σ(x − c), …"""

    n: np.ndarray
    x2: np.ndarray
    sse: np.ndarray
    x_d: np.ndarray
    y_d: np.ndarray
    y2_d: np.ndarray
    r_d: np.ndarray
    r2_d: np.ndarray
    r_norm: np.ndarray  # Σ‖r‖
    r2_by_x2: np.ndarray  # Σ ‖r‖²/‖x‖²
    r2_by_spread: np.ndarray  # Σ ‖r‖²/‖x − x̄‖²
    spread_by_spread: np.ndarray  # Σ var_d(r)/var_d(x)
    r2_by_norm: np.ndarray  # Σ ‖r‖²/‖x‖

    @property
    def d(self) -> int:
        return self.x_d.shape[0]

    @property
    def centred(self) -> float:
        return float(centred(self.n, self.y2_d.sum(), self.y_d))

    @property
    def about_one_mean(self) -> np.ndarray:
        """Σ over all elements of (x − g)², g their one mean; through y, so it cannot cancel."""
        gap_d = (self.x_d - self.y_d) / self.n - self.x_d.sum() / (self.n * self.d)  # c − g
        return (self.y2_d + 2 * gap_d * self.y_d + self.n * gap_d**2).sum()


def _fvu(s: Peers) -> float:
    return float(ratio(s.sse, np.array(s.centred)))


def _sae_lens(s: Peers) -> float:
    """SAELens since its PR 710: 1 or 0 where the variance is below 1e-10."""
    if s.centred / s.n < 1e-10:
        return 1.0 if s.sse == 0 else 0.0
    return 1 - _fvu(s)


def _saebench(s: Peers) -> float:
    """sae-bench 0.6.0: its mean term squares before averaging, and averages over dimensions."""
    a = s.x2 / s.n
    return float(1 - ratio(s.sse / s.n, a - (a / s.d) ** 2))


def _scalar_mean(epsilon: float) -> Formula:
    """R² about one scalar mean of all elements."""

    def formula(s: Peers) -> float:
        elements = s.n * s.d
        variance = s.about_one_mean / elements
        return float(1 - ratio(s.sse / elements, variance + epsilon))

    return formula


def _monoloss_r2(s: Peers) -> float:
    """Mean over dimensions; those of sum of squares ≤ 1e-12 are left out."""
    total_d = s.y2_d - s.y_d**2 / s.n
    kept = total_d > 1e-12
    return float(np.mean(1 - s.r2_d[kept] / total_d[kept])) if kept.any() else float("nan")


def _visaebench_parts(s: Peers) -> tuple[float, float]:
    """First moments are summed over all elements, but divided by the row count alone."""
    error = s.sse / s.n - (s.r_d.sum() / s.n) ** 2
    variance = s.x2 / s.n - (s.x_d.sum() / s.n) ** 2
    return float(error), float(variance)


def _visaebench(s: Peers) -> float:
    error, variance = _visaebench_parts(s)
    return error / variance if variance > 0 else float("nan")


def _visaebench_cross_domain(s: Peers) -> float:
    error, variance = _visaebench_parts(s)
    return max(error, 0.0) / variance if variance > 0 else 1.0


def _per_row(name: str) -> Formula:
    return lambda s: float(getattr(s, name) / s.n)


RECONSTRUCTION: Mapping[tuple[str, str], Formula] = {
    ("fvu", "saev"): _fvu,
    ("explained_variance", "sae_lens"): _sae_lens,
    ("explained_variance", "saebench"): _saebench,
    ("explained_variance", "overcomplete"): _scalar_mean(1e-6),
    ("explained_variance", "hugofry"): lambda s: 1 - _per_row("r2_by_x2")(s),
    ("explained_variance", "clipscope"): lambda s: 1 - _per_row("r2_by_spread")(s),
    ("explained_variance", "visaebench"): lambda s: 1 - _visaebench(s),
    ("fvu", "visaebench"): _visaebench,
    ("fvu", "visaebench_cross_domain"): _visaebench_cross_domain,
    ("fvu", "msae"): _per_row("spread_by_spread"),
    ("r2", "kutsyk"): _scalar_mean(0.0),
    ("r2", "monoloss"): _monoloss_r2,
    ("nmse", "openai"): _per_row("r2_by_x2"),
    ("nmse", "msae"): _per_row("r2_by_x2"),
    ("nmse", "sparc"): _per_row("r2_by_x2"),
    ("nmse", "monoloss"): _per_row("r2_by_x2"),
    ("mse", "sae_lens"): _per_row("sse"),
    ("mse", "hugofry"): lambda s: _per_row("r2_by_norm")(s) / s.d,
    ("mse", "patchsae"): lambda s: _per_row("r2_by_norm")(s) / s.d,
    ("mse", "monoloss_batch_topk"): lambda s: _per_row("sse")(s) / s.d,
    ("mse_per_token", "saev"): _per_row("sse"),
    ("mse_per_dim", "saev"): lambda s: _per_row("sse")(s) / s.d,
    ("l2_loss", "dictionary_learning"): _per_row("r_norm"),
    ("avg_l2", "overcomplete"): _per_row("r_norm"),
}


_CODE_TERMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "nonzero": lambda z: torch.ones_like(z),
    "positive": lambda z: z > 0,
    "above_1e-3": lambda z: z > 1e-3,
    "above_1e-8": lambda z: z > 1e-8,
    "size_1e-6": lambda z: z.abs() >= 1e-6,
    "signed": lambda z: z,
    "size": lambda z: z.abs(),
}


def code_shapes(kinds: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the sums that `code_terms` makes."""
    scalars = dict.fromkeys([*_CODE_TERMS, "size_by_norm"], (kinds,))
    return {**scalars, "positive_s": (kinds, d_sae)}


def code_terms(firings: Firings, norm_n: Tensor, kinds: int, d_sae: int) -> dict[str, Tensor]:
    """Sums over the codes of some images, by token kind; norm_n = ‖x‖ of every row, float64."""
    z_m = firings.value_m.double()
    kind_m = firings.group_m // max(d_sae, 1)
    terms = {name: term(z_m).double() for name, term in _CODE_TERMS.items()}
    terms["size_by_norm"] = z_m.abs() / norm_n[firings.row_m()]
    sums = {name: sum_by(kind_m, term_m, kinds) for name, term_m in terms.items()}
    positive = torch.bincount(firings.group_m[z_m > 0], minlength=kinds * d_sae)
    return {**sums, "positive_s": positive.double().view(kinds, d_sae)}


SPARSITY: Mapping[tuple[str, str], Callable[[Mapping[str, float], int], float]] = {
    **{
        ("l0", project): lambda mean, d_sae: mean["positive"]
        for project in ("prisma", "hugofry", "monoloss", "kissane")
    },
    **{
        ("l0", project): lambda mean, d_sae: mean["nonzero"]
        for project in (
            *("saev", "visaebench", "dictionary_learning", "saebench", "sae_lens"),
            "discover_then_name",
        )
    },
    ("l0", "mlsae"): lambda mean, d_sae: mean["above_1e-3"],
    ("l0", "kutsyk"): lambda mean, d_sae: mean["above_1e-8"],
    ("l0", "overcomplete_print"): lambda mean, d_sae: mean["size_1e-6"],
    ("l0", "overcomplete"): lambda mean, d_sae: mean["nonzero"] / d_sae,
    ("l0", "msae"): lambda mean, d_sae: 1 - mean["nonzero"] / d_sae,
    ("sparsity", "universalsae"): lambda mean, d_sae: 1 - mean["nonzero"] / d_sae,
    ("l1", "saebench"): lambda mean, d_sae: mean["signed"],
    **{
        ("l1", project): lambda mean, d_sae: mean["size"]
        for project in ("sae_lens", "dictionary_learning", "mlsae")
    },
    ("l1", "openai"): lambda mean, d_sae: mean["size_by_norm"],
}
"""(metric, project) -> value from the sums of `code_terms` divided by the rows, and d_sae."""


def sparsity_values(
    sums: Mapping[str, np.ndarray], n: int, d_sae: int
) -> Iterator[tuple[str, str, dict[str, float], float | None]]:
    """(metric, project, variant, value) of one group; None where a peer divides by 0."""
    means = {
        name: float(ratio(value, np.array(n)))
        for name, value in sums.items()
        if name != "positive_s"
    }
    for (metric, project), formula in SPARSITY.items():
        yield metric, project, {}, defined(formula(means, d_sae)) if d_sae else None
    # sae-bench takes "fires" as z > 0 here, while its l0 counts z ≠ 0.
    positive_s = sums["positive_s"]
    for tau in (0.01, 0.1):
        dense = positive_s[positive_s > tau * n].sum()
        yield "normalized_freq", "saebench", {"tau": tau}, defined(ratio(dense, positive_s.sum()))


@dataclass(frozen=True)
class Firing:
    """Per latent, over N rows: rows with z ≠ 0, with z > 0, Σz, and images with z ≠ 0."""

    n: int
    active_s: np.ndarray
    sum_s: np.ndarray
    images_s: np.ndarray


def _share(dead_s: np.ndarray) -> float:
    return float(np.mean(dead_s))


def _rarer_than(frequency: float) -> Callable[[Firing], float]:
    return lambda f: _share(f.active_s / f.n < frequency)


DEAD: Mapping[str, Callable[[Firing], float]] = {
    **{
        project: lambda f: _share(f.active_s == 0)
        for project in ("saev", "visaebench", "sparc", "saebench")
    },
    # The summed activation is 0: positive and negative values can cancel.
    "dictionary_learning": lambda f: _share(f.sum_s == 0),
    "overcomplete": lambda f: _share(f.sum_s == 0),
    "hugofry": _rarer_than(1e-8),
    "patchsae": _rarer_than(1e-8),
    "kutsyk": lambda f: _share(np.log10(f.active_s / f.n + 1e-10) <= -9),
    # MonoScore is undefined for a latent that fires on exactly one image, and it counts as dead.
    "monoscore": lambda f: _share(f.images_s <= 1),
}
