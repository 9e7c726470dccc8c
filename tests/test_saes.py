"""Every architecture against a float64 NumPy forward pass written from the formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from saebench.activations import Activation, Gated, Threshold, TopK
from saebench.errors import NonFiniteError, WeightsError
from saebench.finite import all_finite
from saebench.inputs import Scaling
from saebench.saes import Sae, affine

D, S, N = 8, 24, 33


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ACTIVATIONS: dict[str, tuple[Activation, str]] = {
    "relu": (Threshold(), "relu"),
    "topk": (TopK(5), "topk"),
    # so many that the k-th pre-activation of a row is negative
    "topk, large k": (TopK(20), "topk"),
    "topk, signed": (TopK(20, signed=True), "topk"),
    "batchtopk": (Threshold(torch.tensor(1.5)), "batchtopk"),
    "batchtopk, unset": (Threshold(torch.tensor(-1.0)), "batchtopk"),
    "jumprelu": (Threshold(numbers(S, seed=5).abs()), "jumprelu"),
    "jumprelu, negative": (Threshold(numbers(S, seed=5)), "jumprelu"),
    "gated": (
        Gated(numbers(S, seed=5), 0.3 * numbers(S, seed=6), numbers(S, seed=7)),
        "gated",
    ),
    "matryoshka": (Threshold(torch.tensor(0.5)), "matryoshka-batchtopk"),
}


def make(
    name: str, *, pre_bias: bool = False, scale: float = 1.0, mean_d: torch.Tensor | None = None
) -> Sae:
    """Decoder rows of norms 0.5 to 2 and a bias of size 1, so that every slip shows."""
    activation, architecture = ACTIVATIONS[name]
    rows_sd = numbers(S, D, seed=1)
    rows_sd *= (torch.linspace(0.5, 2, S) / rows_sd.norm(dim=1))[:, None]
    b_dec_d = numbers(D, seed=4)
    return Sae(
        W_enc_ds=numbers(D, S, seed=2),
        b_enc_s=0.0 * numbers(S, seed=3) if name == "gated" else numbers(S, seed=3),
        W_dec_sd=rows_sd,
        b_dec_d=b_dec_d,
        activation=activation,
        architecture=architecture,
        prefixes=(6, 24) if name == "matryoshka" else (),
        b_pre_d=b_dec_d if pre_bias else None,
        scaling=Scaling(mean_d, scale),
    )


def twin(sae: Sae, x_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z and x̂ in float64."""
    w = {name: tensor.double().numpy() for name, tensor in sae.tensors.items()}
    mean = w.get("mean", 0.0)
    scale = float(sae.scaling.scale)
    u = (x_nd - mean) * scale
    pre = (u if sae.b_pre_d is None else u - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if sae.architecture == "gated":
        z = np.maximum(pre * np.exp(w["r_mag"]) + w["b_mag"], 0) * (pre + w["b_gate"] > 0)
    elif isinstance(sae.activation, TopK):
        values = pre if sae.activation.signed else np.maximum(pre, 0)
        least = np.sort(values, axis=1)[:, -sae.activation.k, None]
        z = np.where(values >= least, values, 0)
    else:
        z = np.maximum(pre, 0) * (pre > w.get("threshold", 0.0))
    return z, (z @ w["W_dec"] + w["b_dec"]) / scale + mean


@pytest.mark.parametrize("scaling", ["raw", "scaled"])
@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_is_that_of_the_formulas(name: str, pre_bias: bool, scaling: str) -> None:
    sae = make(name, pre_bias=pre_bias)
    if scaling == "scaled":
        sae = make(name, pre_bias=pre_bias, scale=0.25, mean_d=numbers(D, seed=8))
    x_nd = 3 * numbers(N, D, seed=9) + 2
    z_ns, xhat_nd = twin(sae, x_nd.double().numpy())
    codes = sae.encode(x_nd)
    np.testing.assert_allclose(codes.dense(), z_ns, atol=2e-5)
    np.testing.assert_array_equal(codes.l0_n(), (z_ns != 0).sum(axis=1))
    np.testing.assert_allclose(sae.decode(codes), xhat_nd, atol=2e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_row_encodes_the_same_alone_and_in_any_tile(name: str) -> None:
    sae = make(name, pre_bias=True)
    x_nd = numbers(N, D, seed=9)
    together = sae.encode(x_nd).dense()
    singly = torch.cat([sae.encode(x_nd[i : i + 1]).dense() for i in range(N)])
    tiled = sae.encode(x_nd, tile_bytes=4 * S * 5).dense()
    for other in (singly, tiled):
        torch.testing.assert_close(together, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("theta", [torch.tensor(0.5), torch.full((2,), 0.5)])
def test_thresholds_are_strict(theta: torch.Tensor) -> None:
    identity = torch.eye(2)
    sae = Sae(identity, torch.zeros(2), identity, torch.zeros(2), Threshold(theta), "jumprelu")
    codes = sae.encode(torch.tensor([[0.5, 0.5625]]))
    assert codes.indices_m.tolist() == [1]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    x_nd = numbers(N, D, seed=9)
    x_nd[3, 2] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        make(name).encode(x_nd)


def test_large_activations_are_finite() -> None:
    x_nd = torch.full((2, D), 3e38)  # whose sum is not
    assert all_finite(x_nd)


def test_what_an_sae_is_in_a_line() -> None:
    assert repr(make("topk")) == "Sae(topk, 8 -> 24, k=5)"


def test_no_rows() -> None:
    codes = make("topk").encode(torch.zeros(0, D))
    assert (codes.n_rows, codes.d_sae) == (0, S)
    assert make("topk").decode(codes).shape == (0, D)


def test_dense_codes_decode_like_sparse_ones() -> None:
    sae = make("relu")  # about half of its latents are active: above the share for a dense product
    codes = sae.encode(numbers(N, D, seed=9))
    assert codes.values_m.numel() > 0.3 * N * S
    _, expected = twin(sae, numbers(N, D, seed=9).double().numpy())
    np.testing.assert_allclose(sae.decode(codes), expected, atol=1e-4)


def test_affine_is_a_matrix_product() -> None:
    u, w, b = numbers(7, D, seed=1), numbers(D, S, seed=2), numbers(S, seed=3)
    expected = u.double() @ w.double() + b.double()
    torch.testing.assert_close(affine(u, w, b).double(), expected, atol=1e-5, rtol=1e-5)


def test_decoder_norms_are_in_raw_space() -> None:
    norms_s = make("topk", scale=0.25).decoder_norms_s
    np.testing.assert_allclose(norms_s, np.linspace(0.5, 2, S) / 0.25, rtol=1e-6)


def broken(**change: Any) -> Sae:
    eye = torch.eye(4)
    parts: dict[str, Any] = {
        "W_enc_ds": eye,
        "b_enc_s": torch.zeros(4),
        "W_dec_sd": eye,
        "b_dec_d": torch.zeros(4),
        "activation": Threshold(),
        "architecture": "relu",
    }
    return Sae(**{**parts, **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"W_dec_sd": torch.zeros(4, 5)}, r"W_dec has shape \[4, 5\].*asks for \[4, 4\]"),
        ({"b_enc_s": torch.zeros(3)}, r"b_enc has shape \[3\].*asks for \[4\]"),
        ({"activation": Threshold(torch.zeros(3))}, r"threshold has shape \[3\]"),
        ({"scaling": Scaling(torch.zeros(2))}, r"mean has shape \[2\]"),
        ({"b_dec_d": torch.tensor([0, 0, 0, float("nan")])}, "b_dec holds 1 NaN"),
        ({"W_enc_ds": torch.full((4, 4), float("inf"))}, "W_enc holds 16 NaN or infinite"),
        ({"scaling": Scaling(scale=0.0)}, "input scale"),
        ({"activation": TopK(5)}, "k = 5 of 4"),
        ({"prefixes": (2, 3)}, "prefixes"),
        ({"W_enc_ds": torch.zeros(4)}, "no matrices"),
    ],
)
def test_weights_that_make_no_sae(change: dict[str, Any], said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        broken(**change)
