"""Training on activations whose features are known: what each architecture has to find."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch

from saebench.errors import NonFiniteError, UsageError
from saebench.train.fit import Fitted, Measured, fit, measure
from saebench.train.recipe import ARCHITECTURES, PENALISED, Arch
from tests.train_cases import (
    CPU,
    known_features,
    matched_cosine,
    pca_fvu,
    recipe,
    same,
    stream,
    train_on,
)

SHORT = 60  # steps where only identity is asked


@cache
def trained() -> dict[Arch, tuple[Fitted, Measured]]:
    """One SAE of every architecture, all in one pass."""
    x_nd, _ = known_features()
    found = train_on(x_nd, [recipe(arch, steps=1000) for arch in ARCHITECTURES])
    return dict(zip(ARCHITECTURES, found, strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_recovers_the_features(arch: Arch) -> None:
    x_nd, features_fd = known_features()
    fitted, measured = trained()[arch]
    # Nested prefixes share out features differently, and shrinkage costs relu some of its fvu.
    least = 0.75 if arch == "matryoshka-batchtopk" else 0.9
    assert matched_cosine(features_fd, fitted.sae.W_dec_sd) > least
    assert measured.fvu < (0.7 if arch == "relu" else 0.35) * pca_fvu(x_nd, 3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_decoder_rows_have_unit_norm(arch: Arch) -> None:
    norms_s = trained()[arch][0].sae.W_dec_sd.double().norm(dim=1)
    torch.testing.assert_close(norms_s, torch.ones_like(norms_s), atol=1e-6, rtol=0)


@pytest.mark.parametrize("arch", PENALISED)
def test_a_penalty_arrives_at_its_target_l0(arch: Arch) -> None:
    assert trained()[arch][1].l0 == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka-batchtopk"])
def test_a_stored_threshold_gives_k_on_train_rows(arch: Arch) -> None:
    fitted, measured = trained()[arch]
    assert measured.l0 == pytest.approx(3, rel=1e-3)
    # A code depends on its own row alone.
    x_nd = known_features()[0][:50]
    together = fitted.sae.encode(x_nd).dense()
    singly = torch.cat([fitted.sae.encode(row_1d).dense() for row_1d in x_nd.split(1)])
    torch.testing.assert_close(together, singly, atol=1e-5, rtol=0)


def test_topk_has_exactly_k_where_that_many_are_positive() -> None:
    fitted = trained()["topk"][0]
    x_nd, _ = known_features()
    counts_n = fitted.sae.encode(x_nd).l0_n()
    assert int(counts_n.max()) == 3
    assert float((counts_n == 3).float().mean()) > 0.9


def test_few_latents_are_dead() -> None:
    """There are 48 features and 64 latents: a spare one may die, a needed one may not."""
    for arch, (_, measured) in trained().items():
        assert measured.dead <= 64 - 48, arch


def test_a_matryoshka_prefix_reconstructs_by_itself() -> None:
    """The first 28 latents of 64 against those of a BatchTopK SAE, whose order means nothing."""
    x_nd, _ = known_features()

    def prefix_fvu(arch: Arch) -> float:
        sae = trained()[arch][0].sae
        codes_ns = sae.encode(x_nd).dense()
        codes_ns[:, 28:] = 0
        error = (x_nd - codes_ns @ sae.W_dec_sd - sae.b_dec_d).square().sum()
        return float(error / (x_nd - x_nd.mean(0)).square().sum())

    assert trained()["matryoshka-batchtopk"][0].sae.prefixes == (4, 12, 28, 64)
    assert prefix_fvu("matryoshka-batchtopk") < 0.9 * prefix_fvu("batchtopk")


def test_measured_values_are_those_of_numpy() -> None:
    x_nd, _ = known_features()
    fitted, measured = trained()["topk"]
    sae = fitted.sae
    x, W_enc = x_nd.double().numpy(), sae.W_enc_ds.double().numpy()
    pre = (x - sae.b_dec_d.double().numpy()) @ W_enc + sae.b_enc_s.double().numpy()
    kth = np.sort(pre, axis=1)[:, -3:-2]
    z = np.where(pre >= kth, np.maximum(pre, 0), 0)
    error = x - z @ sae.W_dec_sd.double().numpy() - sae.b_dec_d.double().numpy()
    assert measured.n_rows == len(x)
    assert measured.l0 == pytest.approx((z > 0).sum(1).mean(), abs=1e-9)
    assert measured.fvu == pytest.approx((error**2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-4)
    assert measured.dead == int((~(z > 0).any(0)).sum())


def test_several_at_once_are_each_the_one_trained_alone() -> None:
    x_nd, _ = known_features()
    recipes = [recipe(arch, steps=SHORT) for arch in ARCHITECTURES]
    recipes += [recipe("topk", 5, steps=SHORT), recipe("topk", steps=SHORT, seed=1)]
    together = fit(recipes, stream(x_nd), device=CPU)
    for one in together:
        (alone,) = fit([one.recipe], stream(x_nd), device=CPU)
        assert same(one, alone), one.recipe.setting


def test_a_seed_repeats_and_another_differs() -> None:
    x_nd, _ = known_features()
    first, again, other = (
        fit([recipe("topk", steps=SHORT, seed=seed)], stream(x_nd), device=CPU)[0]
        for seed in (3, 3, 4)
    )
    assert same(first, again)
    assert not same(first, other)


def test_hyperparameters_carry_over_to_activations_of_another_scale() -> None:
    x_nd, _ = known_features()
    ((_, on_a),) = train_on(x_nd, [recipe("jumprelu", steps=200)])
    moved_nd = 100 * x_nd + 7  # another mean and scale, the same shape
    ((_, on_b),) = train_on(moved_nd, [recipe("jumprelu", steps=200)])
    assert on_b.fvu == pytest.approx(on_a.fvu, rel=0.02)
    assert on_b.l0 == pytest.approx(on_a.l0, rel=0.02)


def test_tanh_penalty_and_geometric_median() -> None:
    x_nd, _ = known_features()
    ((_, measured),) = train_on(
        x_nd, [recipe("jumprelu", penalty="tanh", b_dec="geometric-median")]
    )
    assert measured.l0 == pytest.approx(3, rel=0.1)
    assert measured.fvu < 0.5 * pca_fvu(x_nd, 3)


def test_the_global_generator_is_left_alone() -> None:
    x_nd, _ = known_features(2000)
    before = torch.get_rng_state()
    fit([recipe("relu", steps=10, dead_after=512)], stream(x_nd), device=CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_divergence_is_an_error_that_names_the_rate() -> None:
    x_nd, _ = known_features(2000)
    with pytest.raises(NonFiniteError, match=r"diverged(.|\n)*--lr"):
        fit([recipe("topk", lr=1e38)], stream(x_nd), device=CPU)


def test_recipes_of_different_lengths_do_not_share_a_pass() -> None:
    x_nd, _ = known_features(2000)
    one = recipe("topk")
    with pytest.raises(UsageError, match="steps"):
        fit([one, dataclasses.replace(one, steps=1)], stream(x_nd), device=CPU)


def test_a_sample_is_measured_on_a_device_in_tiles() -> None:
    x_nd, _ = known_features()
    fitted, measured = trained()["gated"]
    assert measure(fitted.sae, stream(x_nd), CPU) == measured
