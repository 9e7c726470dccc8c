"""Between weights in training and the finished `Sae`, both for raw activations.

In training every SAE has unit decoder rows, a pre-bias and no scaling of its own:
pre = (x − b_dec) W_enc + b_enc. Any SAE of the six architectures can be brought to that form. With
u = (x − mean)·scale, ρ_j = ‖W_dec row j‖ / |scale| and b = b_dec/scale + mean:

    W_enc' = scale·W_enc·ρ     W_dec' = W_dec / (scale·ρ)     b_dec' = b
    b_enc' = (b_enc + (b_dec − b_pre) W_enc)·ρ        θ' = θ·ρ     latents z' = z·ρ
Where latents compete (TopK) or share a threshold (BatchTopK), ρ has to be the same for all.
"""

from __future__ import annotations

import torch

from saebench.activations import Gated, Threshold, TopK
from saebench.errors import UsageError
from saebench.saes import Sae
from saebench.train.architectures import Params
from saebench.train.recipe import ARCHITECTURES, PENALISED, Arch, Recipe

SPREAD = 0.01  # relative spread of decoder norms that counts as rounding
LEAST_THRESHOLD = 1e-8  # JumpReLU's threshold is trained as its logarithm


def to_sae(recipe: Recipe, raw: Params) -> Sae:
    """The finished SAE of weights for raw activations; `threshold_s` where the recipe has one."""
    activation = Threshold()
    b_enc_s = raw["b_enc_s"]
    if recipe.arch == "topk":
        assert recipe.k is not None
        activation = TopK(recipe.k)
    elif recipe.arch == "gated":
        activation = Gated(b_enc_s, raw["r_mag_s"], raw["b_mag_s"])
        b_enc_s = torch.zeros_like(b_enc_s)  # the magnitudes have a bias of their own
    elif recipe.arch != "relu":
        theta_s = raw["threshold_s"]
        activation = Threshold(theta_s if recipe.arch == "jumprelu" else theta_s[0].clone())
    return Sae(
        W_enc_ds=raw["W_enc_ds"],
        b_enc_s=b_enc_s,
        W_dec_sd=raw["W_dec_sd"],
        b_dec_d=raw["b_dec_d"],
        activation=activation,
        architecture=recipe.arch,
        b_pre_d=raw["b_dec_d"],
        prefixes=recipe.prefixes if recipe.arch == "matryoshka-batchtopk" else (),
    )


def architecture_of(sae: Sae, name: str) -> Arch:
    """The architecture to go on training with. Errors: UsageError for one that is not trained."""
    found = sae.architecture
    if found not in ARCHITECTURES:
        raise UsageError(
            f"'{name}' is {found}, which cannot be trained further",
            f"trained are: {', '.join(ARCHITECTURES)}",
        )
    if strange := beyond_training(sae):
        raise UsageError(
            f"'{name}' has {strange}, which no SAE trained here has",
            "train one anew, or adapt another",
        )
    norms_s = sae.decoder_norms_s
    if found not in PENALISED and norms_s.max() > (1 + SPREAD) * norms_s.min():
        raise UsageError(
            f"'{name}' has decoder rows of norm {norms_s.min():.3g} to {norms_s.max():.3g}, and "
            f"making them equal, as training does, changes which latents a {found} SAE selects",
            "only SAEs with equal decoder norms can be adapted in this architecture",
        )
    return found


def beyond_training(sae: Sae) -> str:
    """What an SAE has that the forward pass of training does not; '' where it can be trained on."""
    activation = sae.activation
    parts = {
        "signed latents": isinstance(activation, TopK) and activation.signed,
        "an inclusive threshold": isinstance(activation, Threshold) and activation.inclusive,
        "a k behind its gate": isinstance(activation, Gated) and activation.k is not None,
        "another activation": not isinstance(activation, (TopK, Threshold, Gated)),
        "rows that are normalised one by one": sae.scaling.rows is not None,
        "an input scale for each dimension": isinstance(sae.scaling.scale, torch.Tensor),
        "hidden layers": sae.trunk is not None,
        "another activation as its target": sae.transcoder,
    }
    return next((what for what, has in parts.items() if has), "")


def from_sae(sae: Sae) -> Params:
    """Weights for raw activations in the form of training, with the same reconstruction."""
    rho_s = sae.decoder_norms_s.float()
    if isinstance(sae.activation, (TopK, Threshold)) and sae.architecture not in PENALISED:
        rho_s = torch.full_like(rho_s, float(rho_s.mean()))
    rho_s = torch.where(rho_s > 0, rho_s, torch.ones_like(rho_s))
    mean_d, scale = sae.scaling.mean_d, float(sae.scaling.scale)
    b_pre_d = 0.0 if sae.b_pre_d is None else sae.b_pre_d
    b_enc_s = sae.b_enc_s + (sae.b_dec_d - b_pre_d) @ sae.W_enc_ds
    raw = {
        "W_enc_ds": sae.W_enc_ds * (scale * rho_s),
        "b_enc_s": b_enc_s * rho_s,
        "W_dec_sd": sae.W_dec_sd / (scale * rho_s).unsqueeze(1),
        "b_dec_d": sae.b_dec_d / scale + (0.0 if mean_d is None else mean_d),
    }
    if isinstance(sae.activation, Gated):
        gated = sae.activation
        raw["b_enc_s"] = (b_enc_s + gated.b_gate_s) * rho_s
        raw["b_mag_s"] = (gated.b_mag_s + gated.r_mag_s.exp() * b_enc_s) * rho_s
        raw["r_mag_s"] = gated.r_mag_s
    elif sae.architecture == "jumprelu" and isinstance(sae.activation, Threshold):
        theta = torch.as_tensor(sae.activation.theta, device=rho_s.device)
        raw["threshold_s"] = theta.expand_as(rho_s).clamp_min(LEAST_THRESHOLD) * rho_s
    return raw
