"""Brings dead latents back: AuxK where they still see something, a lower bar where they do not.

A latent is dead when it has not fired on the last `Recipe.dead_after` training rows.

  AuxK (Gao et al. 2024), in every architecture: the k_aux dead latents of largest pre-activation in
    a row reconstruct what the living ones left over, e = x − x̂; loss α·Σ‖e − ê‖² / Σ‖e‖², with
    k_aux the power of two nearest to d/2.
  A lower bar, in the penalised architectures: a penalty drives latents below zero or under their
    threshold, where neither the loss nor AuxK has a gradient. A step at a time, until the latent
    fires on the rows that suit it best, the biases of a dead one rise (relu, gated) and its
    threshold falls, down to where it started (jumprelu). From there on the loss takes over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saebench.train.architectures import Forward, Params

RISE = 1.0  # of a bias, times the learning rate, in units of 1/√d
SINK = 2.5  # of log θ, times the learning rate; Adam moves it by 5 times


def start_threshold(d_model: int) -> float:
    """θ of a new JumpReLU latent: a tenth of the deviation that a random direction sees, 1/√d."""
    return 0.1 * d_model**-0.5


def auxk_loss(params: Params, out: Forward, x_nd: Tensor, dead_s: Tensor) -> Tensor | None:
    """The normalised AuxK loss of a batch, or None when no latent is dead."""
    dead = dead_s.nonzero().squeeze(-1)
    if not len(dead):
        return None
    k_aux = min(2 ** round(math.log2(max(x_nd.shape[1] / 2, 1))), len(dead))
    left_nd = (x_nd - out.recon_nd).detach()
    pre_nq = out.pre_ns[:, dead]
    kept = pre_nq.topk(k_aux, dim=-1, sorted=False)
    codes_nq = torch.zeros_like(pre_nq).scatter(-1, kept.indices, kept.values.relu())
    error = (left_nd - codes_nq @ params["W_dec_sd"][dead]).square().sum()
    return error / left_nd.square().sum().clamp_min(1e-12)


@torch.no_grad()
def lower_the_bar(params: Params, dead_s: Tensor, lr: float) -> None:
    """Move the dead latents of a penalised SAE one step nearer to firing; `lr` is this step's."""
    d_model = len(params["b_dec_d"])
    if "log_threshold_s" in params:
        log_threshold_s = params["log_threshold_s"]
        least = math.log(start_threshold(d_model))
        lower_s = torch.minimum((log_threshold_s - SINK * lr).clamp_min(least), log_threshold_s)
        log_threshold_s.copy_(torch.where(dead_s, lower_s, log_threshold_s))
        return
    for name in ("b_enc_s", "b_mag_s"):
        if name in params:
            params[name] += dead_s * (RISE * lr * d_model**-0.5)
