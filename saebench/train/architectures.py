"""The training-mode forward pass and loss of each architecture.

Inputs are scaled (`saebench.train.scaling`): mean 0 and E‖x‖² = 1 over the train rows, so that a
squared error is an fvu and all hyperparameters carry over from one backbone to another. n rows,
d width, s latents; decoder rows have unit norm; pre = (x − b_dec) W_enc + b_enc.

  relu       z = relu(pre)                               + λ·mean_n Σ_s z
  topk       the k largest of pre in each row, relu      (Gao et al. 2024)
  batchtopk  the n·k largest of relu(pre) in the batch   (Bussmann et al. 2024)
  jumprelu   z = pre·[pre > θ], straight-through for θ   + λ·mean_n Σ_s of
               [pre > θ] (`step`, Rajamanoharan et al. 2024) or tanh(c·z) (`tanh`, Anthropic 2025)
  gated      z = [gate > 0]·relu(mag), gate = pre, mag = e^r_mag·(x − b_dec) W_enc + b_mag
               + λ·mean_n Σ_s relu(gate) + ‖x − decode(relu(gate))‖², its decoder held fixed
  matryoshka-batchtopk  batchtopk, whose loss is the mean over nested prefixes of the latents
               (Bussmann et al. 2025)
The loss is mean_n ‖x − x̂‖² plus what stands above. λ follows the target L0
(`saebench.train.sparsity`), and dead latents are revived (`saebench.train.revive`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saebench.train.recipe import Recipe

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Forward:
    """One batch through an SAE in training. `loss` lacks the penalty, which λ multiplies."""

    pre_ns: Tensor
    codes_ns: Tensor
    recon_nd: Tensor
    loss: Tensor
    penalty: Tensor | None = None


def forward(recipe: Recipe, params: Params, x_nd: Tensor) -> Forward:
    """The forward pass and loss of the recipe's architecture on scaled rows."""
    return _FORWARD[recipe.arch](recipe, params, x_nd)


def _encode(params: Params, x_nd: Tensor) -> Tensor:
    return torch.addmm(params["b_enc_s"], x_nd - params["b_dec_d"], params["W_enc_ds"])


def _decode(params: Params, codes_ns: Tensor) -> Tensor:
    return torch.addmm(params["b_dec_d"], codes_ns, params["W_dec_sd"])


def _squared_error(x_nd: Tensor, recon_nd: Tensor) -> Tensor:
    return (x_nd - recon_nd).square().sum() / len(x_nd)


def _plain(x_nd: Tensor, params: Params, pre_ns: Tensor, codes_ns: Tensor, **terms: Any) -> Forward:
    recon_nd = _decode(params, codes_ns)
    return Forward(pre_ns, codes_ns, recon_nd, _squared_error(x_nd, recon_nd), **terms)


def _relu(recipe: Recipe, params: Params, x_nd: Tensor) -> Forward:
    pre_ns = _encode(params, x_nd)
    codes_ns = pre_ns.relu()
    return _plain(x_nd, params, pre_ns, codes_ns, penalty=codes_ns.sum() / len(x_nd))


def _topk(recipe: Recipe, params: Params, x_nd: Tensor) -> Forward:
    pre_ns = _encode(params, x_nd)
    assert recipe.k is not None
    kept = pre_ns.topk(recipe.k, dim=-1, sorted=False)
    codes_ns = torch.zeros_like(pre_ns).scatter(-1, kept.indices, kept.values.relu())
    return _plain(x_nd, params, pre_ns, codes_ns)


def _batchtopk_codes(recipe: Recipe, pre_ns: Tensor) -> Tensor:
    assert recipe.k is not None
    flat = pre_ns.relu().flatten()
    kept = flat.topk(recipe.k * len(pre_ns), sorted=False)
    return torch.zeros_like(flat).scatter(0, kept.indices, kept.values).view_as(pre_ns)


def _batchtopk(recipe: Recipe, params: Params, x_nd: Tensor) -> Forward:
    pre_ns = _encode(params, x_nd)
    return _plain(x_nd, params, pre_ns, _batchtopk_codes(recipe, pre_ns))


def _matryoshka(recipe: Recipe, params: Params, x_nd: Tensor) -> Forward:
    pre_ns = _encode(params, x_nd)
    codes_ns = _batchtopk_codes(recipe, pre_ns)
    recon_nd, loss, start = params["b_dec_d"], x_nd.new_zeros(()), 0
    for end in recipe.prefixes:
        part = slice(start, end)
        recon_nd = recon_nd + codes_ns[:, part] @ params["W_dec_sd"][part]
        loss = loss + _squared_error(x_nd, recon_nd)
        start = end
    return Forward(pre_ns, codes_ns, recon_nd, loss / len(recipe.prefixes))


def _jumprelu(recipe: Recipe, params: Params, x_nd: Tensor) -> Forward:
    pre_ns = _encode(params, x_nd)
    theta_s = params["log_threshold_s"].exp()
    # In scaled space the pre-activation of a random unit direction has deviation 1/√d.
    width = recipe.bandwidth * x_nd.shape[1] ** -0.5
    codes_ns: Tensor = _Jump.apply(pre_ns, theta_s, width)  # type: ignore[assignment]
    if recipe.penalty == "tanh":
        active = torch.tanh(codes_ns * (recipe.tanh_scale * x_nd.shape[1] ** 0.5))
    else:
        active: Tensor = _Step.apply(pre_ns, theta_s, width)  # type: ignore[no-redef]
    return _plain(x_nd, params, pre_ns, codes_ns, penalty=active.sum() / len(x_nd))


def _gated(recipe: Recipe, params: Params, x_nd: Tensor) -> Forward:
    shared_ns = (x_nd - params["b_dec_d"]) @ params["W_enc_ds"]
    gate_ns = shared_ns + params["b_enc_s"]
    magnitude_ns = shared_ns * params["r_mag_s"].exp() + params["b_mag_s"]
    codes_ns = magnitude_ns.relu() * (gate_ns > 0)
    gate_codes_ns = gate_ns.relu()
    frozen = {name: params[name].detach() for name in ("W_dec_sd", "b_dec_d")}
    gate_loss = _squared_error(x_nd, _decode(frozen, gate_codes_ns))
    plain = _plain(x_nd, params, gate_ns, codes_ns, penalty=gate_codes_ns.sum() / len(x_nd))
    return Forward(gate_ns, codes_ns, plain.recon_nd, plain.loss + gate_loss, plain.penalty)


_FORWARD: Mapping[str, Callable[[Recipe, Params, Tensor], Forward]] = {
    "relu": _relu,
    "topk": _topk,
    "batchtopk": _batchtopk,
    "jumprelu": _jumprelu,
    "gated": _gated,
    "matryoshka-batchtopk": _matryoshka,
}


class _Jump(torch.autograd.Function):
    """z = pre·[pre > θ]; ∂z/∂θ ≈ −(θ/ε)·[|pre − θ| < ε/2], a rectangle of width ε for the jump."""

    @staticmethod
    def forward(ctx: Any, pre_ns: Tensor, theta_s: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre_ns, theta_s)
        ctx.width = width
        return pre_ns * (pre_ns > theta_s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_ns, theta_s = ctx.saved_tensors
        (grad_ns,) = grads
        near_ns = (pre_ns - theta_s).abs() < ctx.width / 2
        grad_theta_s = -(theta_s / ctx.width) * (grad_ns * near_ns).sum(0)
        return grad_ns * (pre_ns > theta_s), grad_theta_s, None


class _Step(torch.autograd.Function):
    """[pre > θ]; its derivative in θ ≈ −(1/ε)·[|pre − θ| < ε/2], and none in pre."""

    @staticmethod
    def forward(ctx: Any, pre_ns: Tensor, theta_s: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre_ns, theta_s)
        ctx.width = width
        return (pre_ns > theta_s).to(pre_ns.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        pre_ns, theta_s = ctx.saved_tensors
        (grad_ns,) = grads
        near_ns = (pre_ns - theta_s).abs() < ctx.width / 2
        return None, -(grad_ns * near_ns).sum(0) / ctx.width, None
