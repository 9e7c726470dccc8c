"""Brings dead latents back: AuxK in every architecture, and resampling in the penalised ones.

A latent is dead when it has not fired on the last `Recipe.dead_after` training rows.

  AuxK (Gao et al. 2024): the k_aux dead latents of largest pre-activation in a row reconstruct
    what the living ones left over, e = x − x̂; loss α·Σ‖e − ê‖² / Σ‖e‖², with k_aux the power of
    two nearest to d/2.
  Resampling (after Bricken et al. 2023), for latents that a penalty has driven below zero, where
    AuxK has no gradient: the decoder row becomes the direction of the residual of a training row,
    drawn with probability ∝ ‖e‖²; the encoder column the same direction at the living ones' mean
    norm; the threshold is low at first; the moments in Adam are forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saebench.train.architectures import Forward, Params

LOW_THRESHOLD = 2.0  # a restarted latent's is e^-2 of the living ones' geometric mean


def auxk_loss(params: Params, out: Forward, x_nd: Tensor, dead_s: Tensor) -> Tensor | None:
    """The normalised AuxK loss of a batch, or None when no latent is dead."""
    dead = dead_s.nonzero().squeeze(-1)
    if not len(dead):
        return None
    k_aux = min(2 ** round(math.log2(max(x_nd.shape[1] / 2, 1))), len(dead))
    left_nd = (x_nd - out.recon_nd).detach()
    kept = out.pre_ns[:, dead].topk(k_aux, dim=-1, sorted=False)
    codes_nq = torch.zeros_like(out.pre_ns[:, dead]).scatter(-1, kept.indices, kept.values.relu())
    error = (left_nd - codes_nq @ params["W_dec_sd"][dead]).square().sum()
    return error / left_nd.square().sum().clamp_min(1e-12)


@torch.no_grad()
def resample(
    params: Params,
    moments: Mapping[str, Sequence[Tensor]],
    out: Forward,
    x_nd: Tensor,
    dead_s: Tensor,
    generator: torch.Generator,
) -> int:
    """Restart the dead latents on rows that are reconstructed badly. Returns how many.

    `moments`: what Adam remembers of each parameter, zeroed at the restarted latents.
    """
    dead = dead_s.nonzero().squeeze(-1)[: len(x_nd)]
    alive_s = ~dead_s
    if not len(dead) or not alive_s.any():
        return 0
    left_nd = x_nd - out.recon_nd
    weight_n = left_nd.square().sum(-1).double().cpu()
    rows = torch.multinomial(weight_n, len(dead), replacement=False, generator=generator)
    direction_qd = torch.nn.functional.normalize(left_nd[rows.to(x_nd.device)], dim=-1)
    norm = params["W_enc_ds"][:, alive_s].norm(dim=0).mean()
    params["W_dec_sd"][dead] = direction_qd
    params["W_enc_ds"][:, dead] = direction_qd.T * norm
    for name in ("b_enc_s", "b_mag_s", "r_mag_s"):
        if name in params:
            params[name][dead] = 0.0
    if "log_threshold_s" in params:
        living = params["log_threshold_s"][alive_s].mean()
        params["log_threshold_s"][dead] = living - LOW_THRESHOLD
    for name, tensors in moments.items():
        for tensor in tensors:
            if name == "W_enc_ds":
                tensor[:, dead] = 0.0
            elif name != "b_dec_d":
                tensor[dead] = 0.0
    return len(dead)
