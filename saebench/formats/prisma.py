"""ViT-Prisma: SAEs and transcoders, as a state dict with config.json or pickled with its config.

    pre = (u − b_dec) @ W_enc + b_enc             u = x, layer-normed x, or x · √d/‖x‖
    z   = relu | top k, then relu | tanh(relu) | leaky relu
    x̂   = z @ W_dec + b_dec                       the normalisation of the row undone
    gated:       relu | top k, then relu | tanh(relu) of exp(r_mag)·p + b_mag, where p + b_gate > 0
                 p = (u − b_dec) @ W_enc; b_enc is in the file and unused
    transcoder:  y = z @ W_dec + b_dec_out (+ x @ W_skip.T), the normalisation undone

config.json without `normalize_activations` means layer norm, as in the project's loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saebench.activations import Activation, Gated, LeakyReLU, Squash, Threshold, TopK
from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.runner import CONFIG, WEIGHTS, Run, opened
from saebench.formats.tensors import dtype_of, flag, number, weights, whole
from saebench.inputs import LayerNorm, Length, RowNorm, Scaling
from saebench.saes import Sae

NAME = "prisma"
_GATED = ("b_gate", "r_mag", "b_mag")
_OUT, _SKIP = "b_dec_out", "W_skip"
_NORMS: Mapping[str, RowNorm | None] = {
    "none": None,
    "layer_norm": LayerNorm(),
    "sqrt_d": Length(),
}
_ROW_NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "sqrt_d"}  # others do nothing
_ACTIVATIONS = ("relu", "topk", "tanh-relu", "leaky_relu")
_DECIDING = (
    *("architecture", "activation_fn_str", "activation_fn_kwargs", "normalize_activations"),
    *("is_transcoder", "transcoder_with_skip_connection"),
)


def recognise(content: Content) -> bool:
    """Whether a state dict has a configuration of ViT-Prisma, or its legacy shape."""
    run = opened(content)
    return run is not None and (run.of_prisma or run.legacy)


def could_be(content: Content) -> bool:
    """A state dict of the right names with a configuration that does not tell, or with none."""
    run = opened(content)
    return run is not None and run.state.keys() <= {*WEIGHTS, *_GATED, _OUT, _SKIP}


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (names, values, sizes), SpecError (what is not stated)."""
    run = opened(content)
    if run is None:
        raise WeightsError("it holds no state dict of ViT-Prisma")
    config = _config(run, content)
    found = weights(run.state, WEIGHTS, (*_GATED, _OUT, _SKIP), what="an SAE of ViT-Prisma")
    run.check(found["W_enc"])
    gated, transcodes = _GATED[0] in found, _OUT in found
    _check_kind(config, found)
    activation = _activation(run, config, facts)
    rows = _row_norm(run, config, facts)
    facts.known("transcode", transcodes)
    facts.always("pre_bias", True)
    facts.always("input", "raw")
    if not gated:
        facts.promise("decoder_norm", "unit")
    _trained_on(run, config, facts)
    if gated:
        facts.note("b_enc is in the file and unused, as its makers' gated forward pass has it")
        activation = _gated(activation, found)
    facts.settle()
    b_enc_s = found["b_enc"]
    return Sae(
        W_enc_ds=found["W_enc"],
        b_enc_s=torch.zeros_like(b_enc_s) if gated else b_enc_s,
        W_dec_sd=found["W_dec"],
        b_dec_d=found[_OUT] if transcodes else found["b_dec"],
        activation=activation,
        architecture=_architecture(activation, gated),
        b_pre_d=found["b_dec"],
        scaling=Scaling(rows=rows),
        transcoder=transcodes,
        skip_dd=found.get(_SKIP),
        stored_dtype=dtype_of(run.state["W_enc"]),
    )


def _config(run: Run, content: Content) -> Mapping[str, Any]:
    """The pickled configuration, and what config.json beside it says in addition.

    Errors: WeightsError where the two disagree.
    """
    _, beside = content.config(CONFIG)
    if run.source != "file" or not Run(run.state, beside, CONFIG).of_prisma:
        return run.config
    for name in _DECIDING:
        if name in run.config and beside.get(name, run.config[name]) != run.config[name]:
            raise WeightsError(
                f"its pickled configuration says {name} = {run.config[name]!r:.80}, and {CONFIG} "
                f"beside it {beside[name]!r:.80}",
                f"remove the  {CONFIG}  that is not this file's",
            )
    return {**beside, **run.config}


def _check_kind(config: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Errors: WeightsError where the configuration is of another kind than the tensors."""
    architecture = config.get("architecture", "standard")
    if architecture not in ("standard", "gated"):
        raise WeightsError(f"its architecture is {architecture!r:.80}", "known: standard, gated")
    transcodes = flag(config.get("is_transcoder", _OUT in found), "is_transcoder")
    name = "transcoder_with_skip_connection"
    skips = transcodes and flag(config.get(name, _SKIP in found), name)
    gated = architecture == "gated" if "architecture" in config else _GATED[0] in found
    expected = {*WEIGHTS}
    expected |= {_OUT} if transcodes else {*_GATED} if gated else set()
    expected |= {_SKIP} if skips else set()
    if wrong := expected ^ found.keys():
        listed = ", ".join(sorted(wrong))
        raise WeightsError(
            f"its configuration and its tensors are of two kinds of SAE: they differ in {listed}",
            "the configuration is of another SAE",
        )


def _row_norm(run: Run, config: Mapping[str, Any], facts: Facts) -> RowNorm | None:
    if "normalize_activations" in config:
        stated = config["normalize_activations"]
        if stated not in (*_ROW_NORMS, "none", "None", None):
            facts.note(f"normalize_activations = {stated!r:.80} does nothing in ViT-Prisma")
        name = _ROW_NORMS.get(str(stated), "none")
        return _NORMS[facts.known("row_norm", name, run.source)]
    if run.source == CONFIG and run.of_prisma:
        facts.note(f"{CONFIG} has no normalize_activations: layer norm, as in the project's loader")
        return _NORMS[facts.known("row_norm", "layer_norm", "format")]
    about = (
        "how each row is normalised; a configuration pickled without it is of before there was "
        "any norm, and the project's loader takes layer_norm"
        if run.config
        else "how each row is normalised"
    )
    return _NORMS[facts.ask_choice("row_norm", about, tuple(_NORMS)) or "none"]


def _activation(run: Run, config: Mapping[str, Any], facts: Facts) -> Activation:
    name = config.get("activation_fn_str", "relu" if run.legacy else None)
    if name is None:
        choices = ("relu", "topk", "tanh-relu")
        name = facts.ask_choice("activation", "what follows the encoder", choices)
    elif name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise WeightsError(f"its activation is {name!r:.80}", f"known: {known}")
    else:
        facts.known("activation", name, run.source)
    given = config.get("activation_fn_kwargs") or {}
    if not isinstance(given, Mapping):
        raise WeightsError(f"activation_fn_kwargs is {given!r:.80}, not a mapping")
    if name == "topk":
        _only(given, "k")
        if "k" in given:
            return TopK(facts.known("k", whole(given["k"], "k"), run.source))
        return TopK(facts.ask_int("k", "how many latents a row keeps"))
    if name == "leaky_relu":
        _only(given, "negative_slope")
        return LeakyReLU(float(number(given.get("negative_slope", 0.01), "negative_slope")))
    return Squash(Threshold()) if name == "tanh-relu" else Threshold()


def _only(given: Mapping[str, Any], name: str) -> None:
    """Errors: WeightsError for parameters of an activation that are not known."""
    if strange := given.keys() - {name}:
        listed = ", ".join(sorted(map(str, strange))[:8])
        raise WeightsError(f"activation_fn_kwargs has no place for: {listed}")


def _gated(activation: Activation, found: Mapping[str, Tensor]) -> Activation:
    """Errors: WeightsError for an activation that Prisma's gated SAE does not take."""
    gated = Gated(*(found[name] for name in _GATED), k=activation.k)
    if isinstance(activation, (Threshold, TopK)):
        return gated
    if isinstance(activation, Squash):
        return Squash(gated)
    raise WeightsError(
        f"it is gated with {type(activation).__name__} behind, which is not read",
        "known behind a gate: relu, topk, tanh-relu",
    )


def _architecture(activation: Activation, gated: bool) -> str:
    if gated:
        return "gated"
    names = {TopK: "topk", LeakyReLU: "leaky-relu", Squash: "tanh-relu"}
    return names.get(type(activation), "relu")


def _trained_on(run: Run, config: Mapping[str, Any], facts: Facts) -> None:
    if not config:
        return
    layer, hook = config.get("hook_point_layer"), config.get("hook_point")
    if "layer_subtype" in config:
        hook = f"blocks.{layer}.{config['layer_subtype']}"
    head = config.get("hook_point_head_index")
    tokens = "cls" if config.get("cls_token_only") else "all"
    facts.trained_on(
        model=config.get("model_name"),
        hook=hook if head is None else f"{hook}, head {head}",
        tokens="patches" if config.get("use_patches_only") else tokens,
        dataset=config.get("dataset_name") or config.get("dataset_path"),
    )
    if run.legacy:
        facts.note(
            f"its configuration says {hook}; ViT-Prisma's own loader takes files of this shape to "
            f"be of hook_mlp_out"
        )
