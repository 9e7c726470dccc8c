"""Brings dead latents back, by AuxK in every architecture and by what AuxK cannot reach.

A latent is dead when it has not fired on the last `Recipe.dead_after` training rows.

  AuxK (Gao et al. 2024): the k_aux dead latents of largest pre-activation in a row reconstruct
    what the living ones left over, e = x − x̂; loss α·Σ‖e − ê‖² / Σ‖e‖², with k_aux the power of
    two nearest to d/2.
  Sinking thresholds (jumprelu): θ of a dead latent has no gradient once nothing comes near it, so
    it falls by a fixed share a step, down to where it started, until the latent fires again.
  Resampling (relu and gated, after Bricken et al. 2023): a penalty drives latents below zero, where
    AuxK has no gradient. The decoder row becomes the direction of the residual of a training row,
    drawn with probability ∝ ‖e‖²; the encoder column the same direction at the living ones' mean
    norm; biases 0; the moments in Adam are forgotten. Seldom, and not in the last steps: a
    restarted latent needs time to find its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saebench.train.architectures import Forward, Params

RESAMPLED = ("relu", "gated")
RESAMPLE_EVERY = 5  # times `dead_after` rows, which is also how long a latent has to be silent
RESAMPLE_UNTIL = 0.6  # share of the steps
SINK = 2.5  # a dead latent's log θ falls by this times the learning rate; Adam moves it by 5 times


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
    kept = out.pre_ns[:, dead].topk(k_aux, dim=-1, sorted=False)
    codes_nq = torch.zeros_like(out.pre_ns[:, dead]).scatter(-1, kept.indices, kept.values.relu())
    error = (left_nd - codes_nq @ params["W_dec_sd"][dead]).square().sum()
    return error / left_nd.square().sum().clamp_min(1e-12)


@torch.no_grad()
def sink_thresholds(log_threshold_s: Tensor, dead_s: Tensor, lr: float, d_model: int) -> None:
    """Lower the thresholds of dead latents by a step, not below that of a new latent."""
    least = math.log(start_threshold(d_model))
    lower_s = (log_threshold_s - SINK * lr).clamp_min(least)
    log_threshold_s.copy_(
        torch.where(dead_s, torch.minimum(lower_s, log_threshold_s), log_threshold_s)
    )


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
    for name, tensors in moments.items():
        for tensor in tensors:
            if name == "W_enc_ds":
                tensor[:, dead] = 0.0
            elif name != "b_dec_d":
                tensor[dead] = 0.0
    return len(dead)
