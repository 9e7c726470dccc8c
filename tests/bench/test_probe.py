"""How fast is a linear probe beside scikit-learn's, both within 1e-4 of the optimum?

    pytest tests/bench/test_probe.py -m bench -n 0 --benchmark-enable -s

Features [20,000 768] with a common mean and variances that fall as i^-1.5, 100 classes that overlap
(at C = 1e-3 a fifth of the rows are told right, at 0.1 nearly all). scikit-learn gets them centred,
in float32, each fit of a path from the one before, and is stopped at the first iteration that comes
within 1e-4 of the optimum; or it is called as people call it: raw features, cold, the default
tolerance. Every fit is checked in float64. Each figure is of one round after a short one.
docs/performance.md has results.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from saebench.probe import DenseRows, Solution, solve
from saebench.probe.curvature import Spectrum
from tests.bench.nearly import fit_until
from tests.bench.setting import timed

pytestmark = pytest.mark.bench

N, D, CLASSES, NEAR = 20_000, 768, 100, 1e-4
PATH = [float(C) for C in np.logspace(-3, 2, 8)]


class Setting:
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        y = rng.permutation(np.arange(N) % CLASSES)
        spread_d = (1.0 + np.arange(D)) ** -0.75
        x = (0.15 * rng.normal(size=(CLASSES, D))[y] + rng.normal(size=(N, D))) * spread_d
        x = x @ np.linalg.qr(rng.normal(size=(D, D)))[0]
        x /= np.sqrt(((x - x.mean(axis=0)) ** 2).mean())
        self.raw, self.y = (x + 3 * rng.normal(size=D)).astype(np.float32), y
        self.x_nd, self.y_n = torch.from_numpy(self.raw), torch.from_numpy(y)
        self.exact = DenseRows.of(self.x_nd, self.y_n, torch.float64)
        self.centred = self.exact.scaled_nd.float().numpy()

    def loss(self, C: float, W_dc: np.ndarray, b_c: np.ndarray) -> float:
        """In float64, with the penalty."""
        W, b = torch.from_numpy(W_dc).double(), torch.from_numpy(b_c).double()
        logits_nc = self.exact.scaled_nd @ W + b
        loss = torch.nn.functional.cross_entropy(logits_nc, self.y_n)
        return float(loss + W.square().sum() / (2 * C * N))

    def path(self, path: Sequence[float]) -> list[Solution]:
        rows, found = DenseRows.of(self.x_nd, self.y_n), []
        shared = Spectrum.of(rows)
        for C in path:
            start = found[-1] if found else None
            found.append(solve(rows, CLASSES, 1 / (C * N), start, shared=shared))
        return found


@pytest.fixture(scope="module")
def setting() -> Setting:
    warnings.filterwarnings("ignore", module="sklearn")
    found = Setting()
    found.path(PATH[:1])  # so that nothing is loaded when time is taken
    return found


@pytest.mark.parametrize("path", [*([C] for C in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)), PATH])
def test_a_fit_and_a_path(setting: Setting, path: list[float]) -> None:
    ours = timed(lambda: setting.path(path))
    found = setting.path(path)
    passes = sum(one.evaluations for one in found)
    theirs, plain, iterations = [0.0, 0.0], [0.0, 0.0], 0
    warm = LogisticRegression(max_iter=5000, warm_start=True)
    for C, one in zip(path, found, strict=True):
        exact = solve(setting.exact, CLASSES, 1 / (C * N), one, tolerance=3e-6)
        assert exact.converged
        own = setting.loss(C, one.W_dc.numpy(), one.b_c.numpy())
        least = min(exact.loss, own)
        assert one.converged
        assert own <= least * (1 + NEAR)
        stopped = fit_until(
            warm.set_params(C=C),
            setting.centred,
            setting.y,
            lambda W_dc, b_c, C=C: setting.loss(C, W_dc, b_c),
            least * (1 + NEAR),
        )
        theirs = [theirs[0] + stopped.clock, theirs[1] + stopped.cpu]
        iterations += stopped.iterations
        usual = timed(lambda C=C: LogisticRegression(C=C).fit(setting.raw, setting.y))
        plain = [plain[0] + usual[0], plain[1] + usual[1]]
    for clock, name in enumerate(("clock", "CPU time")):
        print(
            f"\nC {path}, {torch.get_num_threads()} threads, {name}: ours {ours[clock]:.2f} s, "
            f"{passes} passes; strongest {theirs[clock] / ours[clock]:.1f} times, {iterations} "
            f"iterations; as people call it {plain[clock] / ours[clock]:.1f} times"
        )
