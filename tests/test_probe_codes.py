"""Codes as rows of a linear probe against dense float64 NumPy, and ridge against scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import log_loss

from saebench.codes import Codes
from saebench.probe import PENALTIES, DenseRows, Rows, csr, fit_probe, solve
from saebench.probe.csr import CsrRows
from saebench.probe.ridge import WIDEST, fit_ridge

N, D, C = 333, 90, 7


def codes(share: float, seed: int = 0) -> np.ndarray:
    """[N D] with negative values, an image without codes and a silent latent."""
    rng = np.random.default_rng(seed)
    z = np.where(rng.random((N, D)) < share, rng.normal(size=(N, D)), 0).astype(np.float32)
    z[5], z[:, 3] = 0, 0
    return z


def labels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, C, N))


def rows_of(z: np.ndarray, y_n: torch.Tensor, dtype: torch.dtype = torch.float64) -> CsrRows:
    found = Codes.from_dense(torch.from_numpy(z))
    parts = found.offsets_n1, found.indices_m, found.values_m
    return CsrRows.of(*parts, z.shape[1], y_n, dtype)


def scaled(z: np.ndarray) -> np.ndarray:
    centred = z.astype(np.float64) - z.astype(np.float64).mean(axis=0)
    return centred / np.sqrt((centred**2).mean())


def products(rows: Rows, W_dc: torch.Tensor, R_nc: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """x̃ W and x̃ᵀ R, put together from the blocks."""
    forward, backward, begin = [], torch.zeros_like(W_dc), 0
    for block in rows.blocks():
        forward.append(block.times(W_dc))
        own_mc = R_nc[begin : begin + len(block.y_m)]
        backward += block.transposed_times(own_mc)
        begin += len(block.y_m)
    return torch.cat(forward).numpy(), backward.numpy()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_products_are_those_of_centred_scaled_rows(
    share: float, dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csr, "ROWS", 50)
    z, y_n = codes(share), labels()
    rows, x = rows_of(z, y_n, dtype), scaled(z)
    keep = np.random.default_rng(2).random(N) < 0.7
    some = rows.where(torch.from_numpy(keep))
    every_third = some.where(torch.arange(some.n) % 3 == 0)
    cases = [(rows, np.arange(N)), (some, keep.nonzero()[0]), (every_third, keep.nonzero()[0][::3])]
    for own, which in cases:
        assert own.n == len(which)
        assert torch.equal(own.y_n, y_n[which])
        assert torch.equal(torch.cat([block.y_m for block in own.blocks()]), y_n[which])
        W_dc, R_nc = torch.randn(D, C, dtype=dtype), torch.randn(len(which), C, dtype=dtype)
        forward, backward = products(own, W_dc, R_nc)
        np.testing.assert_allclose(forward, x[which] @ W_dc.double().numpy(), atol=close)
        np.testing.assert_allclose(backward, x[which].T @ R_nc.double().numpy(), atol=close)
    assert len(list(rows.blocks())) == (1 if share > csr.DENSE else 4)


def test_moments_are_those_of_all_entries() -> None:
    z = codes(0.1)
    rows = rows_of(z, labels())
    np.testing.assert_allclose(rows.mean_d.numpy(), z.astype(np.float64).mean(axis=0), atol=1e-15)
    assert rows.scale == pytest.approx(float(np.sqrt(((z - z.mean(axis=0)) ** 2).mean())))


def test_the_covariance_is_that_of_rows_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csr, "ROWS", 50)
    z = codes(0.1)
    rows = rows_of(z, labels())
    for m in (N, 111):
        x = scaled(z)[:: N // m]
        found = rows.covariance(m)
        assert found is not None
        np.testing.assert_allclose(found.numpy(), x.T @ x / m, atol=1e-12)
    monkeypatch.setattr(csr, "COVARIANCE", D - 1)
    assert rows.covariance(N) is None


@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
def test_codes_of_other_types_are_the_same(indices: torch.dtype) -> None:
    found, y_n = Codes.from_dense(torch.from_numpy(codes(0.1))), labels()
    values_m = found.values_m.half()
    rows = CsrRows.of(found.offsets_n1, found.indices_m.to(indices), values_m, D, y_n)
    W_dc, R_nc = torch.randn(D, C), torch.randn(N, C)
    forward, backward = products(rows, W_dc, R_nc)
    z = codes(0.1).astype(np.float16)
    np.testing.assert_allclose(forward, scaled(z) @ W_dc.double().numpy(), atol=1e-4)
    np.testing.assert_allclose(backward, scaled(z).T @ R_nc.double().numpy(), atol=1e-4)


def test_columns_are_some_latents_in_the_order_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csr, "ROWS", 50)
    z = codes(0.1)
    found = rows_of(z, labels()).columns(torch.tensor([7, 3, 80]))
    assert isinstance(found, DenseRows)
    np.testing.assert_allclose(found.scaled_nd, scaled(z[:, [7, 3, 80]]), atol=1e-12)
    W_dc = torch.randn(3, C, dtype=torch.float64)
    forward, _ = products(found, W_dc, torch.zeros(N, C, dtype=torch.float64))
    np.testing.assert_allclose(forward, scaled(z[:, [7, 3, 80]]) @ W_dc.numpy(), atol=1e-12)


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_the_optimum_on_codes_is_that_of_scikit_learn(penalty: float) -> None:
    z, y_n = codes(0.1), labels()
    model = LogisticRegression(C=1 / (penalty * N), tol=1e-9, max_iter=10_000)
    x = scaled(z)
    model.fit(x, y_n.numpy())
    least = log_loss(y_n.numpy(), model.predict_proba(x)) + penalty / 2 * (model.coef_**2).sum()
    found = solve(rows_of(z, y_n), C, penalty, tolerance=1e-7)
    assert found.converged
    assert found.loss == pytest.approx(least, rel=1e-6)


def test_a_probe_on_codes_is_that_on_dense_features() -> None:
    z, y_n = codes(0.1), labels()
    z[np.arange(N), y_n.numpy() + 10] += 1.5  # so that there is something to find
    held_n = torch.arange(N) % 5 == 4
    dense_rows = DenseRows.of(torch.from_numpy(z), y_n, torch.float64)
    sparse = fit_probe(rows_of(z, y_n), held_n, C, tolerance=1e-6)
    dense = fit_probe(dense_rows, held_n, C, tolerance=1e-6)
    assert sparse.penalty == dense.penalty
    assert sparse.loss_validation == pytest.approx(dense.loss_validation, rel=1e-3)
    assert sparse.loss_train == pytest.approx(dense.loss_train, rel=1e-3)
    logits = z.astype(np.float64) @ sparse.W_dc.numpy() + sparse.b_c.numpy()  # of codes as they are
    shifted = logits - logits.max(axis=1, keepdims=True)
    own = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(N), y_n.numpy()]
    assert own.mean() == pytest.approx(sparse.loss_train, rel=1e-9)


@pytest.mark.parametrize("d", [0, 4])
def test_without_codes_a_probe_says_the_shares_of_the_classes(d: int) -> None:
    y_n = torch.tensor([0, 1, 1, 1] * 5)
    rows = rows_of(np.zeros((20, d), np.float32), y_n, torch.float32)
    assert rows.scale == 1
    found = fit_probe(rows, torch.arange(20) % 5 == 4, 2)
    assert found.W_dc.shape == (d, 2)
    assert found.b_c.softmax(0).numpy() == pytest.approx([0.25, 0.75], rel=0.01)
    ridge = fit_ridge(rows, torch.arange(20) % 5 == 4, 2)
    assert ridge.b_c.numpy() == pytest.approx([-0.5, 0.5])
    assert ridge.accuracy_train == 0.75


# Ridge


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    bunch: Any = load_digits()
    return bunch.data[:900], bunch.target[:900]


def test_ridge_is_that_of_scikit_learn_with_the_best_penalty(
    digits: tuple[np.ndarray, np.ndarray],
) -> None:
    raw, y = digits
    x, held = scaled(raw), np.arange(len(y)) % 5 == 4
    rows = DenseRows.of(torch.from_numpy(raw), torch.from_numpy(y), torch.float64)
    found = fit_ridge(rows, torch.from_numpy(held), 10)
    right = {
        penalty: RidgeClassifier(alpha=penalty * (~held).sum())
        .fit(x[~held], y[~held])
        .score(x[held], y[held])
        for penalty in PENALTIES
    }
    assert found.accuracy_validation == max(right.values())
    assert found.penalty == max(p for p, score in right.items() if score == max(right.values()))
    assert found.penalty < 1
    theirs = RidgeClassifier(alpha=found.penalty * len(y)).fit(x, y)
    logits = raw @ found.W_dc.numpy() + found.b_c.numpy()
    np.testing.assert_allclose(logits, theirs.decision_function(x), atol=1e-10)
    assert found.accuracy_train == theirs.score(x, y)
    assert math.isnan(found.loss_train)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_ridge_of_fewer_rows_than_features_at_every_penalty(
    penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saebench.probe.ridge.PENALTIES", (penalty,))
    z, y_n = codes(0.1)[:60], labels()[:60]
    found = fit_ridge(rows_of(z, y_n), torch.arange(60) % 5 == 4, C)
    sign = 2.0 * np.eye(C)[y_n.numpy()] - 1
    theirs = Ridge(alpha=penalty * 60, solver="svd").fit(scaled(z), sign)
    logits = z.astype(np.float64) @ found.W_dc.numpy() + found.b_c.numpy()
    np.testing.assert_allclose(logits, theirs.predict(scaled(z)), atol=1e-7)


def test_ridge_without_refitting_never_sees_the_held_rows(
    digits: tuple[np.ndarray, np.ndarray],
) -> None:
    raw, y = digits
    held = np.arange(len(y)) % 5 == 4
    rows = DenseRows.of(torch.from_numpy(raw), torch.from_numpy(y), torch.float64)
    found = fit_ridge(rows, torch.from_numpy(held), 10, refit=False)
    x = scaled(raw)
    theirs = RidgeClassifier(alpha=found.penalty * (~held).sum()).fit(x[~held], y[~held])
    logits = raw @ found.W_dc.numpy() + found.b_c.numpy()
    np.testing.assert_allclose(logits, theirs.decision_function(x), atol=1e-10)
    assert found.accuracy_train == theirs.score(x[~held], y[~held])


def test_ridge_of_one_class_and_of_classes_without_rows() -> None:
    z = codes(0.1)
    found = fit_ridge(rows_of(z, torch.full((N,), 2)), torch.zeros(N, dtype=torch.bool), C)
    assert found.absent == C - 1
    assert found.penalty == PENALTIES[0]
    assert math.isnan(found.accuracy_validation)
    assert float(found.W_dc.abs().max()) < 1e-12
    assert found.b_c.numpy() == pytest.approx([-1, -1, 1, -1, -1, -1, -1])


def test_ridge_refuses_what_is_too_wide() -> None:
    z = np.zeros((3, WIDEST + 1), np.float32)
    z[0, 0] = 1
    with pytest.raises(ValueError, match="4097 features"):
        fit_ridge(rows_of(z, torch.zeros(3, dtype=torch.int64)), torch.zeros(3).bool(), 2)


def test_codes_of_low_rank_are_fitted() -> None:
    """Fewer rows than latents, most of them silent: the covariance has many eigenvalues of 0."""
    rng = np.random.default_rng(5)
    n, d = 120, 384
    z = np.zeros((n, d), np.float32)
    y = rng.permutation(np.arange(n) % C)
    for i in range(n):
        z[i, rng.integers(0, 60, 8)] = rng.gamma(2, 0.5, 8)
    for penalty in (1.0, 0.1, 1e-3):
        found = solve(rows_of(z, torch.from_numpy(y), dtype=torch.float32), C, penalty)
        assert found.converged
        assert np.isfinite(found.loss)
        assert found.loss < np.log(C)
