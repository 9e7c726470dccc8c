"""Codes in files are fitted as codes in memory are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from saebench.probe import solve
from saebench.probe.csr import CsrRows
from saebench.probe.mapped_csr import MappedCsrRows
from saebench.tensors import memory_map, to_bytes

N, D, CLASSES = 2000, 60, 5
Part = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def codes() -> scipy.sparse.csr_array:
    """Between 0 and 9 latents a row, frequent ones and rare ones; the first and last rows empty."""
    rng = np.random.default_rng(0)
    share_d = np.geomspace(1, 0.01, D) / np.geomspace(1, 0.01, D).sum()
    rows = [rng.choice(D, size=rng.integers(0, 10), replace=False, p=share_d) for _ in range(N)]
    rows[0] = rows[-1] = np.zeros(0, np.int64)
    indices = np.concatenate([np.sort(row) for row in rows])
    values = rng.exponential(size=len(indices)).astype(np.float32) + 0.1
    offsets = np.cumsum([0, *map(len, rows)])
    return scipy.sparse.csr_array((values, indices, offsets), shape=(N, D))


@pytest.fixture(scope="module")
def y_n(codes: scipy.sparse.csr_array) -> torch.Tensor:
    rng = np.random.default_rng(1)
    logits_nc = codes @ rng.normal(size=(D, CLASSES)) + rng.gumbel(size=(N, CLASSES))
    return torch.from_numpy(logits_nc.argmax(axis=1))


@pytest.fixture
def parts(codes: scipy.sparse.csr_array, tmp_path: Path) -> list[Part]:
    """Cut without regard to where rows begin, as a table's shards are."""
    found = []
    for i, which in enumerate(np.split(np.arange(codes.nnz), [1, 1, 4000, codes.nnz - 7])):
        path = tmp_path / f"{i}.safetensors"
        latents, values = codes.indices[which].astype(np.int32), codes.data[which]
        path.write_bytes(to_bytes({"latent": latents, "value": values}))
        arrays = memory_map(path)
        found.append((arrays["latent"], arrays["value"]))
    return found


def mapped(
    codes: scipy.sparse.csr_array,
    parts: list[Part],
    y_n: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    piece_bytes: int = 8 * 700,
) -> MappedCsrRows:
    """In a dozen pieces."""
    offsets_n1 = codes.indptr.astype(np.int64)
    return MappedCsrRows.of(offsets_n1, parts, D, y_n, dtype=dtype, piece_bytes=piece_bytes)


def products(
    rows: MappedCsrRows | CsrRows, W_dc: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x̃ W, x̃ᵀ x̃ W and the labels."""
    times, gram, labels = [], torch.zeros_like(W_dc), []
    for block in rows.blocks():
        times.append(block.times(W_dc).clone())
        gram += block.transposed_times(times[-1])
        labels.append(block.y_m)
    return torch.cat(times), gram, torch.cat(labels)


def test_mean_scale_and_products_are_those_of_dense_rows(
    codes: scipy.sparse.csr_array, parts: list[Part], y_n: torch.Tensor
) -> None:
    rows = mapped(codes, parts, y_n)
    z_nd = codes.toarray().astype(np.float64)
    centred_nd = z_nd - z_nd.mean(axis=0)
    assert (rows.n, rows.d) == (N, D)
    np.testing.assert_allclose(rows.mean_d, z_nd.mean(axis=0), rtol=1e-12)
    assert rows.scale == pytest.approx(np.sqrt(np.square(centred_nd).mean()), rel=1e-12)
    W_dc = torch.randn(D, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keep_n = torch.arange(N) % 3 == 1
    few_n = torch.isin(torch.arange(N), torch.tensor([0, 1, 999, N - 1]))
    for some, kept in (
        (rows, torch.ones(N, dtype=torch.bool)),
        (rows.where(keep_n), keep_n),
        (rows.where(keep_n).where(few_n[keep_n]), keep_n & few_n),
        (rows.where(few_n), few_n),
    ):
        expected_md = centred_nd[kept.numpy()] / rows.scale
        times_mc, gram_dc, labels = products(some, W_dc)
        assert some.n == len(expected_md)
        np.testing.assert_allclose(times_mc, expected_md @ W_dc.numpy(), atol=1e-9)
        np.testing.assert_allclose(gram_dc, expected_md.T @ times_mc.numpy(), atol=1e-8)
        assert torch.equal(labels, y_n[kept])
        assert torch.equal(some.y_n, y_n[kept])
        covariance_dd = some.covariance(N)
        assert covariance_dd is not None
        expected_dd = expected_md.T @ expected_md / len(expected_md)
        np.testing.assert_allclose(covariance_dd, expected_dd, atol=1e-9)


def test_no_piece_is_larger_than_asked_unless_a_row_is(
    codes: scipy.sparse.csr_array, parts: list[Part], y_n: torch.Tensor
) -> None:
    for held in (5, 30, 700):
        rows = mapped(codes, parts, y_n, piece_bytes=8 * held)
        sizes = [int(piece.offsets_n1[-1]) for piece in rows._pieces()]
        assert max(sizes) <= max(held, 9)
        assert sum(sizes) == codes.nnz
    assert len(sizes) < 2 * codes.nnz / 700


def test_a_fit_is_that_of_codes_in_memory(
    codes: scipy.sparse.csr_array, parts: list[Part], y_n: torch.Tensor
) -> None:
    """In one piece the sums are rounded alike; in several both are within the tolerance."""
    in_memory = CsrRows.of(
        torch.from_numpy(codes.indptr.astype(np.int64)),
        torch.from_numpy(codes.indices.astype(np.int64)),
        torch.from_numpy(codes.data),
        D,
        y_n,
        dtype=torch.float64,
    )
    rows = mapped(codes, parts, y_n, piece_bytes=2**20)
    assert rows.scale == pytest.approx(in_memory.scale, rel=1e-12)
    expected = solve(in_memory, CLASSES, 1e-3)
    found = solve(rows, CLASSES, 1e-3)
    assert found.converged
    torch.testing.assert_close(found.W_dc, expected.W_dc, rtol=1e-6, atol=1e-8)
    pieces = solve(mapped(codes, parts, y_n, dtype=torch.float32), CLASSES, 1e-3)
    assert pieces.converged
    assert pieces.loss == pytest.approx(expected.loss, rel=1e-4)


def test_columns(codes: scipy.sparse.csr_array, parts: list[Part], y_n: torch.Tensor) -> None:
    latents_k = torch.tensor([40, 0, 7])
    dense = mapped(codes, parts, y_n).columns(latents_k)
    raw_nk = dense.scaled_nd * dense.scale + dense.mean_d
    np.testing.assert_allclose(raw_nk, codes.toarray()[:, latents_k], atol=1e-6)
    np.testing.assert_allclose(dense.mean_d, codes.toarray()[:, latents_k].mean(0), rtol=1e-6)
    assert torch.equal(dense.y_n, y_n)


def test_rows_without_codes(y_n: torch.Tensor) -> None:
    rows = MappedCsrRows.of(np.zeros(N + 1, np.int64), [], D, y_n)
    assert rows.scale == 1
    W_dc = torch.ones(D, 3)
    times_mc, gram_dc, _ = products(rows, W_dc)
    assert times_mc.shape == (N, 3)
    assert not times_mc.any()
    assert not gram_dc.any()
