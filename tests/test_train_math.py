"""The formulas of training against NumPy in float64 and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from saebench.activations import Gated, Threshold, TopK
from saebench.errors import DataError, UsageError
from saebench.inputs import Scaling as InputScaling
from saebench.saes import Sae
from saebench.train.architectures import forward
from saebench.train.convert import architecture_of, from_sae, to_sae
from saebench.train.recipe import ARCHITECTURES, Arch
from saebench.train.revive import auxk_loss, lower_the_bar
from saebench.train.scaling import Scaling, geometric_median, measure_scaling
from saebench.train.sparsity import Controller
from saebench.train.trainee import Trainee, batch_threshold
from tests.train_cases import CPU, recipe

D, S, N = 8, 16, 64


def rows(n: int = N, d: int = D, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) / math.sqrt(d)).float()


def trainee(arch: Arch, **fields: float) -> Trainee:
    made = recipe(arch, d_sae=S, batch_rows=N, **fields)  # type: ignore[arg-type]
    return Trainee(made, D, device=CPU)


def numpy_pre(t: Trainee, x_nd: torch.Tensor) -> np.ndarray:
    p = {name: value.detach().double().numpy() for name, value in t.params.items()}
    return (x_nd.double().numpy() - p["b_dec_d"]) @ p["W_enc_ds"] + p["b_enc_s"]


def numpy_error(t: Trainee, x_nd: torch.Tensor, z_ns: np.ndarray) -> float:
    p = {name: value.detach().double().numpy() for name, value in t.params.items()}
    left = x_nd.double().numpy() - z_ns @ p["W_dec_sd"] - p["b_dec_d"]
    return float((left**2).sum(1).mean())


def test_losses_and_penalties() -> None:
    x_nd = rows()
    codes = {}
    for arch in ARCHITECTURES:
        t = trainee(arch, l0=4.0) if arch in ("relu", "jumprelu", "gated") else trainee(arch, k=4)
        with torch.no_grad():
            t.params["b_enc_s"].copy_(torch.linspace(-0.2, 0.2, S))
            for name, value in {"r_mag_s": 0.3, "b_mag_s": -0.05, "log_threshold_s": -2.0}.items():
                if name in t.params:
                    t.params[name].fill_(value)
        out = forward(t.recipe, t.params, x_nd)
        pre = numpy_pre(t, x_nd)
        relu = np.maximum(pre, 0)
        if arch == "relu":
            codes, penalty = relu, relu.sum(1).mean()
        elif arch == "topk":
            codes, penalty = np.where(pre >= np.sort(pre, axis=1)[:, -4:-3], relu, 0), None
        elif arch == "jumprelu":
            codes = pre * (pre > math.exp(-2))
            penalty = (pre > math.exp(-2)).sum(1).mean()
        elif arch == "gated":
            shared = pre - t.params["b_enc_s"].detach().double().numpy()
            codes = (pre > 0) * np.maximum(shared * math.exp(0.3) - 0.05, 0)
            penalty = relu.sum(1).mean()
        else:
            codes, penalty = np.where(relu >= np.sort(relu.ravel())[-4 * N], relu, 0), None
        np.testing.assert_allclose(out.codes_ns.detach().numpy(), codes, atol=1e-6)
        expected = numpy_error(t, x_nd, codes)
        if arch == "gated":
            expected += numpy_error(t, x_nd, relu)
        if arch == "matryoshka-batchtopk":
            prefixes = (1, 3, 7, 16)
            masked = [np.where(np.arange(S) < end, codes, 0) for end in prefixes]
            expected = np.mean([numpy_error(t, x_nd, z) for z in masked])
        assert out.loss.item() == pytest.approx(expected, rel=1e-5), arch
        if penalty is None:
            assert out.penalty is None
        else:
            assert out.penalty is not None
            assert out.penalty.item() == pytest.approx(penalty, rel=1e-5)


def test_the_gated_auxiliary_decoder_is_held_fixed() -> None:
    """With every gate open and magnitudes equal to gates, the decoder sees one error, not two."""
    x_nd = rows()
    t = trainee("gated", l0=4.0)
    out = forward(t.recipe, t.params, x_nd)
    out.loss.backward()
    gated = t.params["W_dec_sd"].grad
    plain = trainee("relu", l0=4.0)  # the same start
    forward(plain.recipe, plain.params, x_nd).loss.backward()
    assert gated is not None
    torch.testing.assert_close(gated, plain.params["W_dec_sd"].grad, atol=1e-7, rtol=1e-5)


def test_the_straight_through_gradients_of_jumprelu() -> None:
    """∂loss/∂θ = Σ_n −(θ/ε)·(∂loss/∂z)·K and ∂L0/∂θ = −(1/ε)·mean_n K, K = [|pre − θ| < ε/2]."""
    x_nd = rows(512)
    t = trainee("jumprelu", l0=4.0, bandwidth=1.5)
    with torch.no_grad():
        t.params["log_threshold_s"].fill_(math.log(0.2))
    width = 1.5 / math.sqrt(D)
    pre = numpy_pre(t, x_nd)
    near = np.abs(pre - 0.2) < width / 2
    out = forward(t.recipe, t.params, x_nd)
    assert out.penalty is not None
    (of_l0,) = torch.autograd.grad(out.penalty, t.params["log_threshold_s"], retain_graph=True)
    # By the chain rule through θ = exp(log θ): a factor of θ.
    np.testing.assert_allclose(of_l0.numpy(), -0.2 * near.mean(0) / width, rtol=1e-4)
    z = pre * (pre > 0.2)
    W_dec = t.params["W_dec_sd"].detach().double().numpy()
    grad_z = -2 * (x_nd.double().numpy() - z @ W_dec) @ W_dec.T / len(x_nd)
    (of_loss,) = torch.autograd.grad(out.loss, t.params["log_threshold_s"])
    expected = 0.2 * (-(0.2 / width) * (grad_z * near).sum(0))
    np.testing.assert_allclose(of_loss.numpy(), expected, rtol=1e-3, atol=1e-6)


def test_auxk_lets_the_dead_explain_what_is_left() -> None:
    x_nd = rows()
    t = trainee("topk", k=2)
    dead_s = torch.arange(S) >= 6
    out = forward(t.recipe, t.params, x_nd)
    found = auxk_loss(t.params, out, x_nd, dead_s)
    pre = numpy_pre(t, x_nd)[:, 6:]
    kept = np.where(pre >= np.sort(pre, axis=1)[:, -4:-3], np.maximum(pre, 0), 0)  # d/2 = 4
    left = (x_nd - out.recon_nd).detach().double().numpy()
    W_dec = t.params["W_dec_sd"].detach().double().numpy()[6:]
    expected = ((left - kept @ W_dec) ** 2).sum() / (left**2).sum()
    assert found is not None
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert auxk_loss(t.params, out, x_nd, torch.zeros(S, dtype=torch.bool)) is None


def test_thresholds_of_the_dead_sink_to_where_they_started() -> None:
    least = math.log(0.1 / math.sqrt(D))
    params = {"log_threshold_s": torch.zeros(4), "b_enc_s": torch.zeros(4), "b_dec_d": rows(1)[0]}
    dead_s = torch.tensor([True, False, True, False])
    lower_the_bar(params, dead_s, 0.01)
    assert params["log_threshold_s"].tolist() == pytest.approx([-0.025, 0, -0.025, 0])
    params["log_threshold_s"][0] = least - 1  # one that training took below stays
    for _ in range(200):
        lower_the_bar(params, dead_s, 0.01)
    assert params["log_threshold_s"].tolist() == pytest.approx([least - 1, 0, least, 0])
    assert params["b_enc_s"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("arch", ["relu", "gated", "jumprelu"])
def test_a_dead_latent_fires_again_where_it_fits_best(arch: Arch) -> None:
    """Without any gradient: the loss cannot reach a latent that is below zero on every row."""
    x_nd = rows()
    t = trainee(arch, l0=4.0)
    dead_s = torch.arange(S) == 3
    with torch.no_grad():
        for name in ("b_enc_s", "b_mag_s"):
            if name in t.params and arch != "jumprelu":
                t.params[name][3] = -3.0
        if arch == "jumprelu":
            t.params["log_threshold_s"][3] = 3.0
    best = int(numpy_pre(t, x_nd)[:, 3].argmax())
    fired_n = torch.zeros(N, dtype=torch.bool)
    for _ in range(5000):
        fired_n = forward(t.recipe, t.params, x_nd).codes_ns[:, 3] > 0
        if fired_n.any():
            break
        lower_the_bar(t.params, dead_s, 0.004)
    assert fired_n.nonzero().flatten().tolist() == [best]


def test_scaling_is_mean_and_root_mean_square_and_folds_away() -> None:
    x_nd = rows(500) * 30 + 1000
    scaling = measure_scaling(x_nd.split(64))
    x = x_nd.double().numpy()
    np.testing.assert_allclose(scaling.mean_d.numpy(), x.mean(0), rtol=1e-6)
    expected = math.sqrt(((x - x.mean(0)) ** 2).sum(1).mean())
    assert scaling.scale == pytest.approx(expected, rel=1e-9)
    raw = {"W_enc_ds": rows(D, S), "b_enc_s": rows(1, S)[0], "b_dec_d": rows(1)[0]}
    back = scaling.unfold(scaling.fold(raw))
    for name, value in raw.items():
        torch.testing.assert_close(back[name], value, atol=1e-4, rtol=1e-5)
    with pytest.raises(DataError, match="all the same"):
        measure_scaling([torch.ones(10, 3)])
    with pytest.raises(DataError, match="no activations"):
        measure_scaling([])


def test_the_geometric_median_makes_unit_vectors_cancel() -> None:
    x_nd = rows(400).double()
    x_nd[:60] += 50  # outliers move the mean, and hardly the median
    median_d = geometric_median(x_nd).double()
    pull_d = torch.nn.functional.normalize(x_nd - median_d, dim=-1).sum(0)
    assert float(pull_d.norm()) < 1e-3
    assert float((x_nd.mean(0) - median_d).norm()) > 5


def test_a_batch_threshold_leaves_k_a_row() -> None:
    t = trainee("batchtopk", k=3)
    x_nd = rows(500)
    theta = batch_threshold(t.weights(), x_nd.split(64), 3)
    pre = numpy_pre(t, x_nd)
    assert (pre > theta).sum() == 1500
    # With fewer positive than k there is no threshold to find: ReLU.
    assert batch_threshold(t.weights(), [x_nd], S - 1) == 0


def test_the_controller_steers_a_system_to_its_target() -> None:
    """A made-up SAE whose L0 follows its penalty with delay: log L0 → 5 − 2·log1p(100 λ)."""
    for target in (4.0, 16.0, 64.0):
        controller, l0, steps = Controller(target), 150.0, 2000
        for step in range(steps):
            coefficient = controller.coefficient(l0, step / steps)
            aim = math.exp(5 - 2 * math.log1p(100 * coefficient))
            l0 += 0.05 * (aim - l0)
        assert l0 == pytest.approx(target, rel=0.03)


def other_form(sae: Sae, *, pre_bias: bool, norms: bool) -> Sae:
    """The same function written in another convention: scaled input, no pre-bias, free norms."""
    mean_d, scale = torch.full((D,), 2.0), 0.25
    b_dec_d = (sae.b_dec_d - mean_d) * scale
    W_enc_ds = sae.W_enc_ds / scale
    b_enc_s = sae.b_enc_s if pre_bias else sae.b_enc_s - b_dec_d @ W_enc_ds
    activation, W_dec_sd = sae.activation, sae.W_dec_sd * scale
    if norms:
        rho_s = torch.linspace(0.5, 2, S)
        W_enc_ds, b_enc_s = W_enc_ds / rho_s, b_enc_s / rho_s
        W_dec_sd = W_dec_sd * rho_s.unsqueeze(1)
        if isinstance(activation, Gated):
            activation = Gated(
                activation.b_gate_s / rho_s, activation.r_mag_s, activation.b_mag_s / rho_s
            )
        elif isinstance(activation, Threshold) and isinstance(activation.theta, torch.Tensor):
            activation = Threshold(activation.theta / rho_s)
    return replace(
        sae,
        W_enc_ds=W_enc_ds,
        b_enc_s=b_enc_s,
        W_dec_sd=W_dec_sd,
        b_dec_d=b_dec_d,
        activation=activation,
        b_pre_d=b_dec_d if pre_bias else None,
        scaling=InputScaling(mean_d, scale),
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("pre_bias", [True, False])
def test_starting_from_an_sae_reconstructs_what_it_does(arch: Arch, pre_bias: bool) -> None:
    x_nd = rows() * 5 + 2
    scaling = Scaling(x_nd.mean(0), 3.0)
    t = trainee(arch, l0=4.0) if arch in ("relu", "jumprelu", "gated") else trainee(arch, k=4)
    raw = scaling.fold(t.weights())
    raw["b_enc_s"] = raw["b_enc_s"] + torch.linspace(-0.3, 0.3, S)
    if "threshold_s" not in raw:
        raw["threshold_s"] = torch.full((S,), 0.4)
    sae = other_form(
        to_sae(t.recipe, raw), pre_bias=pre_bias, norms=arch in ("relu", "jumprelu", "gated")
    )
    assert architecture_of(sae, "it") == arch
    started = Trainee(t.recipe, D, device=CPU, weights=scaling.unfold(from_sae(sae)))
    after = scaling.fold(started.weights())
    after.setdefault("threshold_s", raw["threshold_s"])
    again = to_sae(t.recipe, after)
    expected = sae.decode(sae.encode(x_nd))
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(again.decode(again.encode(x_nd)), expected, atol=1e-4, rtol=1e-4)
    norms_s = again.W_dec_sd.norm(dim=1)
    torch.testing.assert_close(norms_s, torch.ones(S), atol=1e-5, rtol=0)


def test_what_cannot_be_trained_further_is_refused() -> None:
    t = trainee("topk", k=4)
    sae = to_sae(t.recipe, t.weights())
    with pytest.raises(UsageError, match=r"norm 1 to 2"):
        architecture_of(
            replace(sae, W_dec_sd=sae.W_dec_sd * torch.linspace(1, 2, S).unsqueeze(1)), "it"
        )
    with pytest.raises(UsageError, match="signed"):
        architecture_of(replace(sae, activation=TopK(4, signed=True)), "it")
    gated = replace(sae, activation=Gated(*torch.ones(3, S), k=4), architecture="gated")
    with pytest.raises(UsageError, match="a k behind its gate"):
        architecture_of(gated, "it")
    with pytest.raises(UsageError, match="pursuit"):
        architecture_of(replace(sae, architecture="pursuit"), "it")
