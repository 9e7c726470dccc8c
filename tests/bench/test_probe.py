"""How fast is a linear probe beside scikit-learn's, both within 1e-4 of the optimum?

    pytest tests/bench/test_probe.py -m bench -n 0 --benchmark-enable -s

Features [20,000 768] with a common mean and variances that fall as 1/i, 100 classes. scikit-learn
gets them centred, float32, each fit of a path from the one before, and of its iterations the least
that come within 1e-4 of the optimum; or as people call it: raw, cold, its default tolerance. Every
fit is checked in float64. Ratios are of medians over interleaved rounds in one process.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from saebench.probe import DenseRows, Solution, solve
from saebench.probe.whitening import Whitening
from tests.bench.setting import Interleaved
from tests.bench.test_speed import report

pytestmark = pytest.mark.bench

N, D, CLASSES, ROUNDS = 20_000, 768, 100, 3
PATH = [float(C) for C in np.logspace(-3, 2, 8)]


class Setting:
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        y = rng.permutation(np.arange(N) % CLASSES)
        spread_d = (1.0 + np.arange(D)) ** -0.5
        x = (rng.normal(size=(CLASSES, D))[y] / 2 + rng.normal(size=(N, D))) * spread_d
        x = x @ np.linalg.qr(rng.normal(size=(D, D)))[0]
        x /= np.sqrt(((x - x.mean(axis=0)) ** 2).mean())
        self.raw, self.y = (x + 3 * rng.normal(size=D)).astype(np.float32), y
        self.x_nd, self.y_n = torch.from_numpy(self.raw), torch.from_numpy(y)
        rows = DenseRows.of(self.x_nd, self.y_n)
        self.exact_nd = (self.x_nd.double() - rows.mean_d) / rows.scale
        self.centred = self.exact_nd.float().numpy()
        self.least: dict[float, float] = {}
        exact, start = DenseRows.of(self.x_nd, self.y_n, torch.float64), None
        for C in PATH:
            start = solve(exact, CLASSES, 1 / (C * N), start, tolerance=1e-7)
            assert start.converged
            self.least[C] = start.loss

    def excess(self, C: float, W_dc: Tensor, b_c: Tensor) -> float:
        loss = torch.nn.functional.cross_entropy(self.exact_nd @ W_dc + b_c, self.y_n)
        return float(loss + W_dc.square().sum() / (2 * C * N)) / self.least[C] - 1

    def path(self, path: list[float]) -> list[Solution]:
        rows, found = DenseRows.of(self.x_nd, self.y_n), []
        shared = Whitening.of(rows)
        for C in path:
            start = found[-1] if found else None
            found.append(solve(rows, CLASSES, 1 / (C * N), start, shared=shared))
        return found

    def strongest(self, path: list[float], iterations: list[int]) -> None:
        """From each fit to the next."""
        model = LogisticRegression(tol=1e-12, warm_start=True)
        for C, count in zip(path, iterations, strict=True):
            model.set_params(C=C, max_iter=count).fit(self.centred, self.y)

    def needed(self, path: list[float]) -> list[int]:
        """Iterations of each fit that come within 1e-4, by fives."""
        model, found = LogisticRegression(tol=1e-12), []
        for C in path:
            count, before = 0, copy.deepcopy(model).set_params(C=C, warm_start=True)
            while not count or self.excess(C, *_arrays(model)) > 1e-4:
                count += 5
                model = copy.deepcopy(before).set_params(max_iter=count)
                model.fit(self.centred, self.y)
            found.append(count)
        return found

    def plain(self, path: list[float]) -> None:
        for C in path:
            LogisticRegression(C=C).fit(self.raw, self.y)


def _arrays(model: LogisticRegression) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(model.coef_.T).double(), torch.from_numpy(model.intercept_).double()


@pytest.fixture(scope="module")
def setting() -> Setting:
    warnings.filterwarnings("ignore", module="sklearn")
    return Setting()


@pytest.mark.parametrize("path", [*([C] for C in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)), PATH])
def test_a_fit_and_a_path(benchmark: Any, setting: Setting, path: list[float]) -> None:
    for C in path:
        if C not in setting.least:
            exact = DenseRows.of(setting.x_nd, setting.y_n, torch.float64)
            found = solve(exact, CLASSES, 1 / (C * N), tolerance=1e-7)
            setting.least[C] = found.loss
    for C, found in zip(path, setting.path(path), strict=True):
        assert found.converged
        assert setting.excess(C, found.W_dc, found.b_c) <= 1e-4
    iterations = setting.needed(path)
    rounds = Interleaved(
        saebench=lambda: setting.path(path),
        strongest=lambda: setting.strongest(path, iterations),
        plain=lambda: setting.plain(path),
    )
    report(benchmark, f"C {path}, iterations {iterations}", rounds, ROUNDS)
