"""How much faster than scikit-learn is logistic regression on the codes of a large dictionary?

    pytest tests/bench/test_probe_codes.py -m bench -n 0 -s

20,000 images, 24,576 latents of which 64 are not zero, 100 classes. Both run on one process, on the
same scaled codes, in float32, until their loss is within 1e-4 of the least; scikit-learn is stopped
at the very iteration that reaches it, and what finding that out takes is not counted. Every loss is
taken in float64. docs/performance.md has results.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from saebench.codes import Codes
from saebench.probe import DenseRows, Rows, csr, solve
from saebench.probe.csr import CsrRows
from tests.bench.nearly import fit_until

pytestmark = pytest.mark.bench

N, D, NONZERO, CLASSES = 20_000, 24_576, 64, 100
NEAR = 1e-4  # of the least loss
MOST = 300  # iterations of scikit-learn


@dataclass
class Problem:
    """z: codes over s, for scikit-learn. The same as rows, once in float32, once in float64."""

    z: Any
    y_n: np.ndarray
    rows: CsrRows
    exact: Any

    def loss(self, W_dc: np.ndarray, b_c: np.ndarray, penalty: float) -> float:
        """With its penalty, in float64. The bias is of codes that are not centred."""
        logits_nc = self.exact @ W_dc.astype(np.float64) + b_c
        log_nc = torch.from_numpy(logits_nc).log_softmax(dim=1).numpy()
        square = float((W_dc.astype(np.float64) ** 2).sum())
        return -float(log_nc[np.arange(N), self.y_n].mean()) + penalty / 2 * square


@pytest.fixture(scope="module")
def problem() -> Problem:
    """A few latents are frequent and most are rare; a quarter of an image's tell of its class."""
    rng = np.random.default_rng(0)
    y_n = rng.permutation(np.arange(N) % CLASSES)
    share_d = np.arange(1, D + 1) ** -0.7
    drawn = np.searchsorted(share_d.cumsum() / share_d.sum(), rng.random((N, 3 * NONZERO)))
    own = rng.integers(0, D, (CLASSES, 128))
    place = (128 * rng.random(drawn.shape) ** 2).astype(int)
    drawn = np.where(
        rng.random(drawn.shape) < 0.25, own[y_n[:, None], place], drawn.clip(max=D - 1)
    )
    kept = [np.sort(rng.permutation(np.unique(row))[:NONZERO]) for row in drawn]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in kept])])
    indices = np.concatenate(kept)
    values = rng.gamma(2, 0.5, len(indices)).astype(np.float32)
    parts = [torch.from_numpy(part) for part in (offsets, indices, values)]
    rows = CsrRows.of(parts[0], parts[1], parts[2], D, torch.from_numpy(y_n))
    z = csr_matrix((values / np.float32(rows.scale), indices, offsets), shape=(N, D))
    return Problem(z, y_n, rows, z.astype(np.float64))


@pytest.mark.parametrize("C", [1e-3, 1e-1, 1.0, 1e2])
def test_one_fit(problem: Problem, C: float) -> None:
    """At least three times as fast, at every penalty."""
    penalty = 1 / (C * N)
    best = solve(problem.rows, CLASSES, penalty, tolerance=1e-6)
    clock, cpu = time.perf_counter(), time.process_time()
    found = solve(problem.rows, CLASSES, penalty)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    shift_d = problem.rows.mean_d / problem.rows.scale
    losses = [
        problem.loss(fit.W_dc.numpy(), (fit.b_c - shift_d @ fit.W_dc).numpy(), penalty)
        for fit in (found, best)
    ]
    least = min(losses)
    assert found.converged
    assert losses[0] <= least * (1 + NEAR)
    model = LogisticRegression(C=C, max_iter=MOST)
    slow = fit_until(
        model,
        problem.z,
        problem.y_n,
        lambda W_dc, b_c: problem.loss(W_dc, b_c, penalty),
        least * (1 + NEAR),
    )
    print(
        f"\nC {C:g}, loss {least:.3g}, {torch.get_num_threads()} threads: {slow.clock / clock:.1f} "
        f"times by the clock, {slow.cpu / cpu:.1f} of CPU time ({clock:.1f} s and "
        f"{found.evaluations} passes; scikit-learn {slow.clock:.1f} s, {slow.iterations} "
        f"iterations, and {100 * (slow.loss / least - 1):.3f}% above)"
    )


@pytest.mark.parametrize(("n", "d", "c"), [(4096, 384, 10), (4096, 384, 100), (20_000, 768, 100)])
def test_where_dense_products_are_faster(
    n: int, d: int, c: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of codes that are not zero from where on: what `csr.DENSE` is."""
    monkeypatch.setattr(csr, "DENSE", 1.0)
    shown = []
    for share in (0.02, 0.1, 0.3, 0.5, 0.7):
        z_nd = torch.randn(n, d) * (torch.rand(n, d) < share)
        y_n, codes = torch.zeros(n, dtype=torch.int64), Codes.from_dense(z_nd)
        sparse = CsrRows.of(codes.offsets_n1, codes.indices_m, codes.values_m, d, y_n)
        both: list[Rows] = [sparse, DenseRows.of(z_nd, y_n)]
        W_dc, seconds = torch.randn(d, c), [np.inf, np.inf]
        for _ in range(5):
            for i, rows in enumerate(both):
                start = time.perf_counter()
                for block in rows.blocks():
                    block.transposed_times(block.times(W_dc))
                seconds[i] = min(seconds[i], time.perf_counter() - start)
        shown.append(f"{share:.0%}: {seconds[0] / seconds[1]:.2f}")
    print(f"\n{n:,} x {d}, {c} classes, time by row over time dense: {', '.join(shown)}")
