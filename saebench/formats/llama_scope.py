"""Llama Scope: hyperparams.json, and checkpoints/final.safetensors below it.

The project's loader (lm-saes of late 2024) rewrites the weights before it uses them, and the
threshold is one of what it has rewritten. With f_in, f_out = √d / average norms ("dataset-wise"):

    E, e    = encoder.weight, encoder.bias / f_in                    pre = x @ E.T + e
    D, b    = decoder.weight · f_in/f_out, decoder.bias / f_out      x̂   = z @ D.T + b
    and with sparsity_include_decoder_norm   E, e times, D divided by the norms of D's columns

Here the same is done, so that latents and thresholds are those of the project: x is raw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saebench.activations import Activation, Threshold, TopK
from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, flag, number, weights, whole
from saebench.inputs import Length, OneWay, Scaling
from saebench.saes import Sae

NAME = "llama-scope"
_CONFIG = "hyperparams.json"
_NEEDED = ("encoder.weight", "encoder.bias", "decoder.weight")
_SAID = ("norm_activation", "act_fn", "sparsity_include_decoder_norm")


def recognise(content: Content) -> bool:
    """By the configuration, and two linear layers."""
    return content.has(*_NEEDED) and content.config(_CONFIG)[1].keys() >= {*_SAID, "d_sae"}


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (values that are not known, names, shapes), SpecError."""
    config = content.config(_CONFIG)[1]
    if config.get("use_glu_encoder", False):
        raise WeightsError(f"{_CONFIG} says use_glu_encoder: a gated linear unit is not read")
    places = config.get("hook_point_in"), config.get("hook_point_out")
    transcoder = places[1] is not None and places[0] != places[1]
    has_bias = flag(config.get("use_decoder_bias", True), "use_decoder_bias")
    subtracted = _flag(config, "apply_decoder_bias_to_pre_encoder") and has_bias
    facts.known("pre_bias", subtracted, _CONFIG)
    facts.trained_on(hook=places[0])
    activation, architecture = _activation(config, facts)
    scaling, f_in, f_out = _norms(config, transcoder, facts)
    by_norms = _flag(config, "sparsity_include_decoder_norm")
    facts.settle()
    biases = ("decoder.bias",) if has_bias else ()
    found = weights(content.objects, (*_NEEDED, *biases), what="an SAE of Llama Scope")
    _check_shapes(found, config)
    W_enc_ds, b_enc_s = found.pop("encoder.weight").T, found["encoder.bias"] / f_in
    # A copy of its own, as rows: what is held twice is this, and nothing after it.
    W_dec_sd = found.pop("decoder.weight").T.clone(memory_format=torch.contiguous_format)
    W_dec_sd *= f_in / f_out
    if by_norms:
        norm_s = W_dec_sd.norm(dim=1)
        W_enc_ds, b_enc_s = W_enc_ds * norm_s, b_enc_s * norm_s
        W_dec_sd /= norm_s[:, None]
    b_dec_d = found["decoder.bias"] / f_out if has_bias else W_dec_sd.new_zeros(W_dec_sd.shape[1])
    return Sae(
        W_enc_ds=W_enc_ds,
        b_enc_s=b_enc_s,
        W_dec_sd=W_dec_sd,
        b_dec_d=b_dec_d,
        activation=activation,
        architecture=architecture,
        b_pre_d=b_dec_d if subtracted else None,
        scaling=scaling,
        transcoder=transcoder,
        stored_dtype=dtype_of(content.objects["encoder.weight"]),
    )


def _check_shapes(found: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Errors: WeightsError for a tensor that is not of the size in the configuration."""
    d, s = (whole(config.get(name), name) for name in ("d_model", "d_sae"))
    shapes = {"encoder.weight": [s, d], "encoder.bias": [s], "decoder.weight": [d, s]}
    for name, tensor in found.items():
        if list(tensor.shape) != shapes.get(name, [d]):
            raise WeightsError(
                f"{name} has shape {list(tensor.shape)}, and {_CONFIG} says d_model {d}, d_sae {s}"
            )


def _flag(config: Mapping[str, Any], name: str) -> bool:
    return flag(config.get(name), f"{name} of {_CONFIG}")


def _activation(config: Mapping[str, Any], facts: Facts) -> tuple[Activation, str]:
    """ReLU, JumpReLU with one threshold, or TopK.

    Of a TopK that has a threshold the project's loader says that it becomes a JumpReLU, and leaves
    it a TopK: which is meant has to be said.
    """
    name = str(config["act_fn"]).lower()
    theta = float(number(config.get("jump_relu_threshold", 0.0), "jump_relu_threshold"))
    if name == "topk" and theta > 0:
        about = f"act_fn is topk, and jump_relu_threshold {theta:g}: which of them holds"
        name = facts.ask_choice("activation", about, ("jumprelu", "topk")) or "topk"
    elif name in ("relu", "jumprelu", "topk"):
        facts.known("activation", name, _CONFIG)
    if name == "jumprelu":
        if theta < 0:
            raise WeightsError(f"jump_relu_threshold is {theta}: below 0 it would not cut at all")
        facts.known("threshold", theta, _CONFIG)
        facts.always("strict", True)
        return Threshold(theta), name
    if name not in ("relu", "topk"):
        raise WeightsError(f"act_fn of {_CONFIG} is {name!r:.80}", "known: relu, jumprelu, topk")
    if name == "relu":
        return Threshold(), name
    return TopK(facts.known("k", whole(config.get("top_k"), "top_k"), _CONFIG)), name


def _norms(
    config: Mapping[str, Any], transcoder: bool, facts: Facts
) -> tuple[Scaling, float, float]:
    """What is done to rows, and f_in, f_out. Errors: WeightsError for what depends on a batch."""
    kind = config["norm_activation"]
    facts.known("norm_activation", kind, _CONFIG)
    if kind == "dataset-wise":
        norms = config.get("dataset_average_activation_norm")
        norms = norms if isinstance(norms, Mapping) else {}
        name = "dataset_average_activation_norm"
        found = [number(norms.get(side), f"{name}.{side}") for side in ("in", "out")]
        if not all(0 < norm < float("inf") for norm in found):
            raise WeightsError(f"{name} of {_CONFIG} is {found}, not above 0")
        root = whole(config.get("d_model"), "d_model") ** 0.5
        return Scaling(), root / found[0], root / found[1]
    if kind == "token-wise":
        return Scaling(rows=OneWay(Length()) if transcoder else Length()), 1.0, 1.0
    if kind not in ("inference", "none"):
        raise WeightsError(
            f"norm_activation of {_CONFIG} is {kind!r:.80}",
            "known: dataset-wise, token-wise, inference, none; batch-wise depends on other rows",
        )
    return Scaling(), 1.0, 1.0
