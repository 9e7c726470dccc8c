"""A fitted probe's logits from features and from codes, against dense NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.codes import Codes
from saebench.probing.probes import Fitted, fetched, only

B, S, C = 7, 11, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes_of(share: float, *, b: int = B, s: int = S, seed: int = 1) -> tuple[Codes, np.ndarray]:
    """Codes of which about a share is active, and the same dense."""
    z_bs = (drawn(b, s, seed=seed) * (torch.rand(b, s, generator=_seeded(seed)) < share)).float()
    if b and s:
        z_bs[b // 2] = 0  # an image without codes
    return Codes.from_dense(z_bs), z_bs.double().numpy()


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_logits_of_features() -> None:
    x_bd, W_dc, b_c = drawn(B, S).float(), drawn(S, C, seed=1), drawn(C, seed=2)
    found = Fitted(W_dc, b_c).logits(x_bd)
    assert found.dtype == torch.float64
    expected = x_bd.double().numpy() @ W_dc.numpy() + b_c.numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("latents", [None, [3], [10, 0, 4], list(range(S))[::-1]])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])  # of many codes the way is a dense one
def test_logits_of_codes_and_of_some_latents(share: float, latents: list[int] | None) -> None:
    codes, z_bs = codes_of(share)
    columns = list(range(S)) if latents is None else latents
    W_dc, b_c = drawn(len(columns), C, seed=3), drawn(C, seed=4)
    chosen = None if latents is None else torch.tensor(latents)
    found = Fitted(W_dc, b_c, chosen).logits(codes)
    assert (found.dtype, found.shape) == (torch.float64, (B, C))
    expected = z_bs[:, columns] @ W_dc.numpy() + b_c.numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("latents", [[], [5], [5, 2, 9]])
def test_some_latents_alone_are_numbered_as_listed(share: float, latents: list[int]) -> None:
    codes, z_bs = codes_of(share)
    found = only(codes, torch.tensor(latents, dtype=torch.int64))
    assert (found.n_rows, found.d_sae) == (B, len(latents))
    assert np.array_equal(found.dense().numpy(), z_bs[:, latents].astype(np.float32))
    assert found.n_nonzero == np.count_nonzero(z_bs[:, latents])


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_rows_that_a_batch_reads_make_the_same_logits(share: float) -> None:
    codes, z_bs = codes_of(share)
    W_dc, b_c = drawn(S, C, seed=3), drawn(C, seed=4)
    some, rows_kc = fetched(codes, W_dc)
    assert len(rows_kc) == some.d_sae == np.count_nonzero(z_bs.any(axis=0))
    expected = z_bs @ W_dc.numpy() + b_c.numpy()
    np.testing.assert_allclose(Fitted(rows_kc, b_c).logits(some), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("b", "s"), [(3, 0), (0, S), (0, 0)])
def test_no_latents_and_no_images(b: int, s: int) -> None:
    codes = Codes.empty(b, s)
    b_c = drawn(C)
    for latents in (None, torch.arange(s)):
        found = Fitted(drawn(s, C), b_c, latents).logits(codes)
        assert torch.equal(found, b_c.expand(b, C))


def test_logits_of_weights_that_lie_the_other_way_round() -> None:
    codes, z_bs = codes_of(0.1)
    W_dc = drawn(C, S).T
    expected = z_bs @ W_dc.numpy()
    np.testing.assert_allclose(Fitted(W_dc, drawn(C) * 0).logits(codes), expected, atol=1e-14)


def test_an_image_has_the_same_logits_in_every_batch() -> None:
    codes, _ = codes_of(0.3, b=40)
    fitted = Fitted(drawn(S, C), drawn(C))
    whole = fitted.logits(codes)
    for i in range(40):
        np.testing.assert_allclose(fitted.logits(codes[i : i + 1]), whole[i : i + 1], rtol=1e-13)
