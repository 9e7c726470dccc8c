"""MonoLoss: autoencoder_final.pt, whose `config` says which of four SAEs it is.

    topk         OpenAI's class (saebench.formats.openai)
    vanilla      z = relu((u − b_dec) @ W_enc + b_enc)
    jumprelu     z = relu(u @ W_enc + b_enc) where above exp(log_threshold)
    batch_topk   z = relu((u − b_dec) @ W_enc) where above a threshold: b_enc is there and unused
                 and in all but topk   x̂ = z @ W_dec + b_dec

Every vector is brought to length 1 by the project's loader; `normalize` adds a layer norm behind.
batch_topk has no threshold: its makers keep the k·B largest of a batch, in evaluation too, so that
a code depends on the other rows. It is read with a threshold that is given or estimated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from saebench.activations import Threshold
from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.openai import class_activation, class_sae, is_class
from saebench.formats.tensors import dtype_of, flag, weights, whole
from saebench.inputs import InTurn, LayerNorm, Length, Scaling
from saebench.saes import Sae

NAME = "monoloss"
_BASE = ("W_enc", "b_enc", "W_dec", "b_dec")
_JUMP = "jumprelu.log_threshold"
_WRAPPER = ("model_state_dict", "config", "step", "epoch")
_KINDS = ("vanilla", "jumprelu", "batch_topk")
_CONFIG = "training_config.json"


def recognise(content: Content) -> bool:
    """Its wrapper, or a bare state dict of a kind that nobody else has, or with its config."""
    if content.has(*_WRAPPER):
        return bool(content.nested("model_state_dict") and content.nested("config"))
    if content.has(*_BASE, _JUMP):
        return True
    return could_be(content) and "mono_coef" in content.config(_CONFIG)[1]


def could_be(content: Content) -> bool:
    """A bare state dict whose names others have too."""
    return is_class(content.names) or content.names == set(_BASE)


def read(content: Content, facts: Facts) -> Sae:
    """Errors: SpecError (what is not stated), WeightsError (names or values not known)."""
    state, source, config = _parts(content)
    facts.always("input_length", "unit")
    facts.trained_on(dataset=config.get("train_path"))
    if "pre_bias" in state:
        activation = class_activation(state, facts)
        scaling = _scaling(config, source, facts)
        facts.settle()
        return class_sae(state, activation, scaling)
    kind = _kind(state, config, source, facts)
    scaling = _scaling(config, source, facts)
    facts.always("pre_bias", kind != "jumprelu")
    theta = 0.0
    if kind == "batch_topk":
        if "topk_k" in config:
            facts.known("k", whole(config["topk_k"], "topk_k"), source)
        about = "its makers keep the top k·B of a batch, which no row alone decides"
        theta = facts.ask_number("threshold", about, estimate="threshold")
        facts.note("its makers' own evaluation takes the top k·B of each batch, not a threshold")
        facts.note("b_enc is in the file and unused, as its makers' forward pass does not use it")
    facts.settle()
    found = weights(state, _BASE, (_JUMP,), what=f"a {kind} SAE of MonoLoss")
    b_enc_s = found["b_enc"]
    return Sae(
        W_enc_ds=found["W_enc"],
        b_enc_s=torch.zeros_like(b_enc_s) if kind == "batch_topk" else b_enc_s,
        W_dec_sd=found["W_dec"],
        b_dec_d=found["b_dec"],
        activation=Threshold(found[_JUMP].exp() if kind == "jumprelu" else theta),
        architecture={"vanilla": "relu", "batch_topk": "batchtopk"}.get(kind, kind),
        b_pre_d=None if kind == "jumprelu" else found["b_dec"],
        scaling=scaling,
        stored_dtype=dtype_of(state["W_enc"]),
    )


def _parts(content: Content) -> tuple[Mapping[str, Any], str, Mapping[str, Any]]:
    """(state dict, where its configuration is, that configuration)."""
    if content.has("model_state_dict"):
        return content.nested("model_state_dict"), "file", content.nested("config")
    return content.objects, *content.config(_CONFIG)


def _kind(state: Mapping[str, Any], config: Mapping[str, Any], source: str, facts: Facts) -> str:
    """Which of `_KINDS`. Errors: WeightsError (another, or one whose tensors are not these)."""
    if _JUMP not in state and "model_type" not in config:
        about = "which SAE of MonoLoss it is"
        return facts.ask_choice("activation", about, ("vanilla", "batch_topk"))
    kind = str(config.get("model_type", "jumprelu"))
    if kind not in _KINDS or (kind == "jumprelu") != (_JUMP in state):
        raise WeightsError(f"it is said to be '{kind:.80}', and holds {', '.join(sorted(state))}")
    return facts.known("activation", kind, "file" if _JUMP in state else source)


def _scaling(config: Mapping[str, Any], source: str, facts: Facts) -> Scaling:
    """Unit length, and a layer norm behind it where the configuration says so."""
    said = [flag(config[key], key) for key in ("normalize", "input_unit_norm") if key in config]
    if len(set(said)) > 1:
        raise WeightsError("its config says normalize and input_unit_norm, and they differ")
    if said:
        norm = facts.known("row_norm", "layer_norm" if said[0] else "none", source)
    else:
        about = "what its class does to a row of length 1 (normalize)"
        norm = facts.ask_choice("row_norm", about, ("none", "layer_norm"))
    unit = Length(1.0)
    return Scaling(rows=InTurn(unit, LayerNorm()) if norm == "layer_norm" else unit)
