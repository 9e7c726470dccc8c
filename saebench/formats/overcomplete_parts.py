"""What overcomplete's state dicts hold, whoever exports them: an encoder beside a dictionary.

    encoder.mlp_blocks.<i>.{0,1}   h ← relu(norm(h @ A + a)), and + h where it is residual
    encoder.final_block.{0,1}      pre = norm(h @ A + a)
    encoder.{weight, bias}         `untied()`: pre = x @ weight.T (+ bias)
    encoder.{tied_to.*, bias}      `tied()`: pre = x @ D.T (+ bias), D the dictionary, which
                                   tied_to repeats

A norm is a batch norm, which running statistics make affine, so that it is folded, or a layer norm.
Its eps is torch's default. Nothing in the file says whether hidden blocks are residual. There is no
pre-bias and no bias of the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saebench.activations import Activation, LatentNorm, Threshold
from saebench.errors import WeightsError
from saebench.formats import overcomplete_dictionary as dictionary
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, float32, weights
from saebench.inputs import Scaling
from saebench.saes import Sae
from saebench.trunk import Block, Trunk

FINAL = "encoder.final_block.0.weight"
EPS = 1e-5  # of torch's norms

_UNTIED, _BIAS, _TIED = "encoder.weight", "encoder.bias", "encoder.tied_to."
_LAYER = re.compile(
    r"(encoder\.(?:final_block|mlp_blocks\.\d+))\."
    r"(?:0\.(?:weight|bias)|1\.(?:weight|bias|running_mean|running_var|num_batches_tracked))"
)
_REFUSED = {
    r"encoder\.attention_blocks\..*": "it has an attention encoder: codes depend on other tokens",
    r"encoder\.resnet_blocks\..*": "it has a convolutional encoder: codes depend on other places",
    r"Q": "it is a quantised SAE (QSAE), which its makers call experimental",
}


@dataclass(frozen=True)
class Parts:
    """The tensors of a state dict as float32, and what it does not say of them."""

    floats: Mapping[str, Tensor]
    stored_dtype: str
    residual: bool
    norm: dictionary.Norm

    @property
    def d(self) -> int:
        """The width of what it reads and writes."""
        return self.floats[dictionary.needed(self.floats)[-1]].shape[1]


def ask(
    state: Mapping[str, Any],
    facts: Facts,
    *,
    ignored: Collection[str] = (),
    default_norm: str = "",
    encodes: bool = True,
) -> Parts:
    """`ignored`: names that are read elsewhere; `encodes`: whether the encoder has a say.

    `default_norm`: as in `overcomplete_dictionary.ask`.
    Errors: WeightsError for a name that is strange or missing, a kind that is not read, shapes.
    """
    _refuse(state)
    layers = [name for name in state if _LAYER.fullmatch(name)]
    own = layers or [name for name in (_UNTIED, _BIAS) if name in state]
    counts = [name for name in own if name.endswith("num_batches_tracked")]
    repeated = [name for name in state if name.startswith(_TIED)]
    for name in repeated:
        _check_repeats(state, name)
    needed = {*own, *dictionary.needed(state), *((FINAL,) if layers else ())} - set(counts)
    floats = weights(
        state,
        needed,
        (dictionary.MULTIPLIER,),
        ignored=[*counts, *repeated, *ignored],
        what="an SAE of overcomplete",
    )
    stored = next(name for name in (FINAL, _UNTIED, *dictionary.needed(state)) if name in floats)
    dtype = dtype_of(state[stored])
    facts.always("pre_bias", False)
    norm = dictionary.ask(floats, dtype, facts, default_norm)
    residual = encodes and _ask_residual(floats, facts)
    return Parts(floats, dtype, residual, norm)


def _refuse(state: Mapping[str, Any]) -> None:
    """Errors: WeightsError for the kinds that cannot be read, by what they are."""
    for pattern, what in _REFUSED.items():
        if any(re.fullmatch(pattern, name) for name in state):
            raise WeightsError(what, "it is not read: use another checkpoint")


def _check_repeats(state: Mapping[str, Any], name: str) -> None:
    """Errors: WeightsError for what is tied to another dictionary, or not tied at all."""
    again, once = state[name], state.get(f"dictionary.{name.removeprefix(_TIED)}")
    if FINAL in state or _UNTIED in state or not _alike(again, once):
        raise WeightsError(
            f"{name} should repeat the dictionary that the encoder is tied to, and does not"
        )


def _alike(a: Any, b: Any) -> bool:
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
    return tensors and a.dtype == b.dtype and torch.equal(a, b)


def _ask_residual(floats: Mapping[str, Tensor], facts: Facts) -> bool:
    """Where a hidden block keeps the width, it can be either."""
    shapes = [floats[f"{prefix}.0.weight"].shape for prefix in _hidden(floats)]
    if not any(len(set(shape)) == 1 for shape in shapes):
        return False
    return facts.ask_bool("residual", "whether hidden blocks add what they read to what they give")


def jump_relu(log_theta_s: Any, facts: Facts) -> Threshold:
    """JumpSAE's: h where h ≥ exp(θ). Errors: WeightsError for thresholds that are none."""
    facts.known("thresholds", "logarithms")
    facts.always("strict", False)
    return Threshold(thresholds(log_theta_s, "thresholds").exp(), inclusive=True)


def thresholds(value: Any, name: str) -> Tensor:
    """θ [s]. Errors: WeightsError."""
    theta_s = float32(value, name)
    if theta_s.ndim != 1:
        raise WeightsError(f"{name} has shape {list(theta_s.shape)}, not [s]")
    return theta_s


def assembled(parts: Parts, activation: Activation, architecture: str, scaling: Scaling) -> Sae:
    """The SAE of these parts. Errors: WeightsError for shapes that do not fit."""
    floats, trunk = parts.floats, None
    D_sd = dictionary.dictionary_of(floats, parts.norm)
    if FINAL in floats:
        trunk = _trunk(floats, parts.residual)
        final = _layer(floats, "encoder.final_block")
        W_enc_ds, b_enc_s = final.W_ih, final.b_h
        if final.gain_h is not None and final.shift_h is not None:
            activation = LatentNorm(activation, final.gain_h, final.shift_h, EPS)
    else:
        W_enc_ds = _matrix(floats, _UNTIED).T if _UNTIED in floats else D_sd.T
        b_enc_s = floats.get(_BIAS, D_sd.new_zeros(len(D_sd)))
    return Sae(
        W_enc_ds=W_enc_ds,
        b_enc_s=b_enc_s,
        W_dec_sd=D_sd,
        b_dec_d=D_sd.new_zeros(D_sd.shape[1]),
        activation=activation,
        architecture=architecture,
        scaling=scaling,
        trunk=trunk,
        stored_dtype=parts.stored_dtype,
    )


def _trunk(floats: Mapping[str, Tensor], residual: bool) -> Trunk | None:
    blocks = []
    for prefix in _hidden(floats):
        block = _layer(floats, prefix)
        reads, gives = block.W_ih.shape
        if blocks and reads != (before := blocks[-1].W_ih.shape[1]):
            raise WeightsError(
                f"{prefix} reads {reads} dimensions, and what is before gives {before}"
            )
        # Contiguous, as it comes back from saebench's own format: products round alike then.
        W_ih, adds = block.W_ih.contiguous(), residual and reads == gives
        blocks.append(replace(block, W_ih=W_ih, residual=adds))
    return Trunk(tuple(blocks)) if blocks else None


def _hidden(floats: Mapping[str, Tensor]) -> list[str]:
    """The prefixes of the hidden blocks, first to last. Errors: WeightsError where one lacks."""
    found = {match[1] for name in floats if (match := _LAYER.fullmatch(name))}
    hidden = [f"encoder.mlp_blocks.{i}" for i in range(len(found - {"encoder.final_block"}))]
    if missing := [prefix for prefix in hidden if f"{prefix}.0.weight" not in floats]:
        raise WeightsError(f"{missing[0]} is missing, and later blocks are there")
    return hidden


def _layer(floats: Mapping[str, Tensor], prefix: str) -> Block:
    """A linear layer and its norm. Errors: WeightsError for another norm, or other shapes."""
    W_hi = _matrix(floats, f"{prefix}.0.weight")
    b_h = _vector(floats, f"{prefix}.0.bias", len(W_hi))
    norm = sorted(name for name in floats if name.startswith(f"{prefix}.1."))
    held = {name.rpartition(".")[2]: _vector(floats, name, len(W_hi)) for name in norm}
    if not held:
        return Block(W_hi.T, b_h)
    if set(held) == {"weight", "bias"}:
        return Block(W_hi.T, b_h, held["weight"], held["bias"], EPS)
    if set(held) != {"weight", "bias", "running_mean", "running_var"}:
        raise WeightsError(
            f"{prefix}.1 is no layer norm, and no batch norm with running statistics: it has "
            f"{', '.join(held)}",
            "a batch norm without running statistics depends on the other rows of a batch",
        )
    gain_h = held["weight"].double() / (held["running_var"].double() + EPS).sqrt()
    shift_h = (b_h - held["running_mean"].double()) * gain_h + held["bias"]
    return Block((W_hi * gain_h.float()[:, None]).T, shift_h.float())


def _matrix(floats: Mapping[str, Tensor], name: str) -> Tensor:
    if floats[name].ndim != 2:
        raise WeightsError(f"{name} has shape {list(floats[name].shape)}, and is no matrix")
    return floats[name]


def _vector(floats: Mapping[str, Tensor], name: str, length: int) -> Tensor:
    found = list(floats[name].shape) if name in floats else "none"
    if found != [length]:
        raise WeightsError(f"{name} has to have shape [{length}], and has {found}")
    return floats[name]
