"""Controls against their closed forms, through the task that measures them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.controls import Identity, Mean, Pca, Zero, random_like, shuffled_decoder
from saebench.errors import Mismatch
from saebench.saes import Coder
from tests.measure import measure
from tests.test_saes import D, make

KINDS = {"cls": slice(0, 1), "patches": slice(1, 5)}


def activations(seed: int = 0, images: int = 40) -> Tensor:
    """[b 5 d], with a mean of its own for each token kind and directions of unequal variance."""
    generator = torch.Generator().manual_seed(seed)
    x_btd = torch.randn(images, 5, D, generator=generator) * torch.linspace(0.5, 3, D)
    x_btd[:, 0] += 4
    return x_btd + torch.linspace(-1, 2, D)


def value(metric: str, coder: Coder, x_btd: Tensor, group: str = "all") -> float:
    found = measure("reconstruction", x_btd, coder, kinds=KINDS)[metric, group, ""].value
    assert found is not None
    return found


def total(x_nd: np.ndarray) -> float:
    return float(((x_nd - x_nd.mean(0)) ** 2).sum())


def test_identity_is_perfect() -> None:
    x_btd = activations()
    rows = measure("reconstruction", x_btd, Identity(D), kinds=KINDS)
    for group in ("all", "cls", "patches"):
        assert rows["fvu", group, ""].value == 0
        assert rows["explained_variance", group, ""].value == 1
        assert rows["cosine", group, ""].value == pytest.approx(1, abs=1e-15)
        assert rows["l2_ratio", group, ""].value == pytest.approx(1, abs=1e-15)
    assert measure("sparsity", x_btd, Identity(D), kinds=KINDS)["l0", "all", ""].value == D


@pytest.mark.parametrize("group", ["all", "cls", "patches"])
def test_zero(group: str) -> None:
    x_btd = activations()
    x_nd = x_btd[:, KINDS.get(group, slice(None))].flatten(0, 1).double().numpy()
    expected = 1 + len(x_nd) * (x_nd.mean(0) ** 2).sum() / total(x_nd)
    assert value("fvu", Zero(D), x_btd, group) == pytest.approx(expected, rel=1e-12)
    rows = measure("reconstruction", x_btd, Zero(D), kinds=KINDS)
    for metric in ("cosine", "relative_reconstruction_bias"):
        assert rows[metric, group, ""].value is None
        assert rows[metric, group, ""].note


@pytest.mark.parametrize("group", ["cls", "patches"])
def test_mean_of_each_kind(group: str) -> None:
    train, test = activations(1), activations(2)
    mean_td = torch.cat(
        [train[:, part].mean((0, 1)).expand(part.stop - part.start, D) for part in KINDS.values()]
    )
    x_nd = test[:, KINDS[group]].flatten(0, 1).double().numpy()
    gap = mean_td[KINDS[group]][0].double().numpy() - x_nd.mean(0)
    expected = 1 + len(x_nd) * (gap**2).sum() / total(x_nd)
    assert value("fvu", Mean(mean_td), test, group) == pytest.approx(expected, rel=1e-12)


def test_mean_needs_whole_images() -> None:
    control = Mean(torch.zeros(5, D))
    with pytest.raises(Mismatch, match="7 rows"):
        control.decode(control.encode(torch.zeros(7, D)))


@pytest.mark.parametrize("k", [1, 3, D - 1])
def test_pca_on_its_own_data_loses_the_discarded_variance(k: int) -> None:
    x_btd = activations()
    x_nd = x_btd.flatten(0, 1).double().numpy()
    values, basis = np.linalg.eigh(np.cov(x_nd.T, bias=True))
    basis_dk = torch.from_numpy(basis[:, ::-1][:, :k].copy()).float()
    control = Pca(torch.from_numpy(x_nd.mean(0)).float(), basis_dk)
    expected = values[: D - k].sum() / values.sum()
    assert value("fvu", control, x_btd) == pytest.approx(expected, rel=1e-5)


def test_coders_without_latents_have_no_densities() -> None:
    rows = measure("sparsity", activations(), Zero(D), kinds=KINDS)
    assert rows["l0", "all", ""].value == 0
    assert rows["dense_fraction", "all", ""].value is None
    rows = measure("dead_neurons", activations(), Zero(D), kinds=KINDS)
    assert rows["dead_fraction", "all", ""].value is None
    assert rows["dead_fraction", "all", ""].note


def test_random_control() -> None:
    sae, mean_d = make("relu"), torch.arange(float(D))

    def control(seed: int, scale: float = 1.0, l0: float = 3.4):
        generator = torch.Generator().manual_seed(seed)
        return random_like(sae, l0=l0, scale=scale, mean_d=mean_d, generator=generator)

    one = control(0)
    assert (one.d_model, one.d_sae, one.k) == (D, sae.d_sae, 3)
    assert control(0, l0=0.2).k == 1
    torch.testing.assert_close(one.W_dec_sd.norm(dim=1), torch.ones(sae.d_sae))
    assert torch.equal(one.W_enc_ds, one.W_dec_sd.T)
    assert torch.equal(one.W_dec_sd, control(0).W_dec_sd)
    assert not torch.equal(one.W_dec_sd, control(1).W_dec_sd)
    assert torch.equal(one.decode(one.encode(mean_d[None])), mean_d[None])
    # the scale multiplies what is added to the mean, and leaves the selection as it was
    x_nd = activations().flatten(0, 1)
    added = one.decode(one.encode(x_nd)) - mean_d
    scaled = control(0, scale=0.3)
    torch.testing.assert_close(
        scaled.decode(scaled.encode(x_nd)) - mean_d, 0.3 * added, atol=1e-4, rtol=1e-4
    )


def test_shuffled_decoder_is_a_permutation() -> None:
    sae = make("topk")
    shuffled = shuffled_decoder(sae, torch.Generator().manual_seed(3))
    assert not torch.equal(shuffled.W_dec_sd, sae.W_dec_sd)
    rows = [tuple(row) for row in sae.W_dec_sd.tolist()]
    assert sorted(tuple(row) for row in shuffled.W_dec_sd.tolist()) == sorted(rows)
    x_nd = activations().flatten(0, 1)
    assert torch.equal(shuffled.encode(x_nd).dense(), sae.encode(x_nd).dense())
