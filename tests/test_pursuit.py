"""Both matching pursuits against their definitions: a residual that each step shortens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from saebench.activations import Activation
from saebench.errors import WeightsError
from saebench.formats import read_sae, write_sae
from saebench.moving import moved
from saebench.pursuit import MatchingPursuit, OrthogonalMatchingPursuit
from saebench.saes import Sae
from saebench.trunk import Block
from tests.checkpoints import D, S, inputs, numbers, rows


def sae_of(D_sd: torch.Tensor, k: int, max_iter: int | None = None) -> Sae:
    """`max_iter`: of an orthogonal one."""
    s, d = D_sd.shape
    activation: Activation = MatchingPursuit(k, D_sd)
    if max_iter is not None:
        activation = OrthogonalMatchingPursuit(k, max_iter, D_sd)
    return Sae(
        W_enc_ds=D_sd.T,
        b_enc_s=torch.zeros(s),
        W_dec_sd=D_sd,
        b_dec_d=torch.zeros(d),
        activation=activation,
        architecture="matching-pursuit" if max_iter is None else "orthogonal-matching-pursuit",
    )


def pursued(x_d: np.ndarray, D_sd: np.ndarray, k: int) -> np.ndarray:
    """[s], of one row, in float64, by the residual itself."""
    z_s, r_d = np.zeros(len(D_sd)), x_d.copy()
    for _ in range(k):
        scores_s = D_sd @ r_d
        j = int(scores_s.argmax())
        z_s[j] += scores_s[j]
        r_d -= scores_s[j] * D_sd[j]
    return z_s


def pursued_at_right_angles(x_d: np.ndarray, D_sd: np.ndarray, k: int) -> np.ndarray:
    """[s], of one row, in float64, with a solver of its own."""
    z_s, taken_j = np.zeros(len(D_sd)), []
    for _ in range(k):
        scores_s = D_sd @ (x_d - z_s @ D_sd)
        scores_s[taken_j] = -np.inf
        taken_j.append(int(scores_s.argmax()))
        z_s[taken_j], _ = nnls(D_sd[taken_j].T, x_d)
    return z_s


@pytest.mark.parametrize("k", [1, 2, 5, 12])
@pytest.mark.parametrize(("s", "unit"), [(S, True), (S, False), (D, True)])
def test_as_its_definition(s: int, unit: bool, k: int) -> None:
    k = min(k, s)
    # Atoms of lengths 0.5 to 1.2: a step on one longer than √2 would lengthen the residual.
    D_sd = rows(s, unit=True) * (1 if unit else torch.linspace(0.5, 1.2, s)[:, None])
    x_nd = inputs()
    z_ns = sae_of(D_sd, k).encode(x_nd).dense()
    expected = [pursued(x_d, D_sd.double().numpy(), k) for x_d in x_nd.double().numpy()]
    np.testing.assert_allclose(z_ns, np.stack(expected), atol=1e-5)


def test_a_latent_that_is_taken_again_adds_up() -> None:
    D_sd = torch.tensor([[0.5, 0.0], [0.0, 0.25]])  # a step leaves 3/4 of x along the first
    z_ns = sae_of(D_sd, 2).encode(torch.tensor([[4.0, 0.0]])).dense()
    assert z_ns.tolist() == [[2.0 + 1.5, 0.0]]


def test_where_all_latents_point_away_the_code_is_negative() -> None:
    codes = sae_of(torch.eye(2), 1).encode(torch.tensor([[-3.0, -1.0]]))
    assert codes.dense().tolist() == [[0.0, -1.0]]


def test_at_most_k_latents_and_no_more_latents_than_there_are() -> None:
    codes = sae_of(rows(unit=True), 3).encode(inputs())
    assert int(codes.l0_n().max()) == 3
    with pytest.raises(WeightsError, match="k = 17 of 16"):
        sae_of(rows(), 17)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(("s", "unit"), [(S, True), (S, False), (D, True)])
def test_the_orthogonal_one_as_its_definition(s: int, unit: bool, k: int) -> None:
    D_sd, x_nd = rows(s, unit=unit), inputs()
    z_ns = sae_of(D_sd, k, 5000).encode(x_nd).dense()
    D64_sd = D_sd.double().numpy()
    expected = [pursued_at_right_angles(x_d, D64_sd, k) for x_d in x_nd.double().numpy()]
    np.testing.assert_allclose(z_ns, np.stack(expected), atol=1e-4)


def test_the_orthogonal_one_with_few_steps_is_on_its_way() -> None:
    D_sd = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    x_nd = torch.tensor([[1.0, 2.0]])
    # The second latent is first and weighs 2.2. The other points away from what is left, and would
    # weigh less than zero.
    assert sae_of(D_sd, 2, 1).encode(x_nd).dense().tolist() == [[0.0, pytest.approx(2.2)]]
    # From [1, 0] one step along the slope [0, 0.6 - 0.9], of length 1/√(2 + 2·0.6²).
    code = sae_of(D_sd, 2, 1).encode(torch.tensor([[1.0, 0.375]])).dense()
    assert code.tolist() == [[pytest.approx(1.0), pytest.approx(0.3 / 2.72**0.5)]]


def test_the_orthogonal_one_takes_no_latent_again_and_none_below_zero() -> None:
    D_sd = torch.tensor([[0.5, 0.0], [0.0, 0.25]])
    assert sae_of(D_sd, 2, 500).encode(torch.tensor([[4.0, 0.0]])).dense().tolist() == [[8.0, 0.0]]
    assert sae_of(torch.eye(2), 2, 3).encode(torch.tensor([[-3.0, -1.0]])).n_nonzero == 0


@pytest.mark.parametrize("max_iter", [None, 10])
def test_rows_do_not_see_each_other_and_tiles_do_not_show(max_iter: int | None) -> None:
    sae, x_nd = sae_of(rows(unit=True), 4, max_iter), inputs()
    alone = torch.cat([sae.encode(x_d[None]).dense() for x_d in x_nd])
    torch.testing.assert_close(alone, sae.encode(x_nd).dense(), atol=1e-5, rtol=0)
    tiled = sae.encode(x_nd, tile_bytes=1).dense()
    torch.testing.assert_close(tiled, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_iter", [None, 10])
def test_kept_in_our_own_format_with_one_dictionary(max_iter: int | None, tmp_path: Path) -> None:
    sae = sae_of(rows(unit=True), 4, max_iter)
    write_sae(sae, tmp_path / "sae.safetensors")
    back = read_sae(tmp_path / "sae.safetensors")
    assert isinstance(back.activation, MatchingPursuit | OrthogonalMatchingPursuit)
    assert type(back.activation) is type(sae.activation)
    assert back.activation.dictionary_sd is back.W_dec_sd
    assert torch.equal(back.encode(inputs()).dense(), sae.encode(inputs()).dense())


def test_what_is_one_tensor_stays_one_on_another_device() -> None:
    b = numbers(D, seed=1)
    there = moved(Block(numbers(D, D, seed=2), b, b, numbers(D, seed=3)), "meta")
    assert there.b_h is there.gain_h
    assert there.W_ih.is_meta
    assert there.shift_h is not there.b_h
