"""Sparse codes and the two-stage top-k, against NumPy on dense arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.codes import Codes
from saebench.topk import topk


def dense(n: int = 7, s: int = 5, seed: int = 0) -> torch.Tensor:
    z_ns = torch.randn(n, s, generator=torch.Generator().manual_seed(seed))
    return torch.where(z_ns.abs() > 0.7, z_ns, 0.0)


def test_round_trip_and_counts() -> None:
    z_ns = dense()
    z_ns[3] = 0
    codes = Codes.from_dense(z_ns)
    assert torch.equal(codes.dense(), z_ns)
    np.testing.assert_array_equal(codes.l0_n(), (z_ns.numpy() != 0).sum(axis=1))
    np.testing.assert_allclose(codes.l1_n(), np.abs(z_ns.double().numpy()).sum(axis=1))
    rows, latents, values = codes.nonzero()
    np.testing.assert_array_equal(np.stack([rows, latents]), np.stack(np.nonzero(z_ns.numpy())))
    assert torch.equal(values, z_ns[rows, latents])


@pytest.mark.parametrize("part", [slice(2, 5), slice(0, 0), slice(None), slice(5, 99), slice(4, 2)])
def test_slices_of_rows(part: slice) -> None:
    z_ns = dense()
    assert torch.equal(Codes.from_dense(z_ns)[part].dense(), z_ns[part])


def test_only_stretches_are_cut() -> None:
    with pytest.raises(IndexError, match="step 1"):
        Codes.from_dense(dense())[::2]


def test_parts_joined_are_the_whole() -> None:
    z_ns = dense()
    joined = Codes.cat([Codes.from_dense(part) for part in z_ns.split(3)])
    assert torch.equal(joined.dense(), z_ns)


def test_topk_codes_drop_zeros() -> None:
    values = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 3.0]])
    codes = Codes.from_topk(values, torch.tensor([[4, 1], [2, 3], [0, 2]]), 5)
    assert codes.l0_n().tolist() == [1, 0, 2]
    assert codes.dense()[2].tolist() == [1, 0, 3, 0, 0]


def test_no_latents() -> None:
    codes = Codes.empty(4, 0)
    assert codes.dense().shape == (4, 0)
    assert codes.l1_n().tolist() == [0, 0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    s=st.integers(1, 3000),
    k=st.integers(1, 40),
    seed=st.integers(0, 99),
    steps=st.sampled_from([0, 3]),
)
def test_topk_is_exact(n: int, s: int, k: int, seed: int, steps: int) -> None:
    """Also with many equal values (`steps` distinct ones)."""
    generator = torch.Generator().manual_seed(seed)
    if steps:
        pre_ns = torch.randint(0, steps, (n, s), generator=generator).float()
    else:
        pre_ns = torch.randn(n, s, generator=generator)
    values_nk, indices_nk = topk(pre_ns, k)
    k = min(k, s)
    expected = np.sort(pre_ns.numpy(), axis=1)[:, ::-1][:, :k]
    np.testing.assert_array_equal(np.sort(values_nk.numpy(), axis=1)[:, ::-1], expected)
    assert torch.equal(pre_ns.gather(1, indices_nk), values_nk)
    assert all(len(set(row)) == k for row in indices_nk.tolist())
