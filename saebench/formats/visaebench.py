"""visaebench: weights and a config.json or config.yaml, in one of two layouts.

    simple      encoder.weight [s d], encoder.bias [s], decoder.weight [s d]; decoder.bias [d]
    exported    a state dict of overcomplete (saebench.formats.overcomplete_parts)

    u = (x − m) / s                 m [d] and a number s, of the activations, not in the file
    h = relu(u @ encoder.weight.T + encoder.bias)
    z = the k largest of h                                     topk
        h where h ≥ threshold, or else _running_threshold      batchtopk
        h where h > jump_thresholds, or else thresholds        jumprelu
    x̂ = (z @ decoder.weight + decoder.bias)·s + m              not the decoder of a torch layer

An exported file is read as overcomplete wrote it, by which visaebench's own loader does not go: its
`thresholds` are logarithms, and equality is kept; its encoder may have norms; its dictionary is
normalised. The simple layout is also that of a dictionary_learning AutoEncoderNew, whose decoder is
the transposed: the configuration tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saebench.activations import Activation, Threshold, TopK
from saebench.errors import WeightsError
from saebench.formats import overcomplete_parts
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.overcomplete_dictionary import WEIGHTS
from saebench.formats.overcomplete_parts import FINAL
from saebench.formats.tensors import dtype_of, number, weights, whole
from saebench.saes import Sae

NAME = "visaebench"
_SIMPLE = ("encoder.weight", "encoder.bias", "decoder.weight")
_CONFIGS = ("config.json", "config.yaml", "config.yml")
_KINDS = ("topk", "batchtopk", "jumprelu")
_KIND_KEYS = ("activation", "sae_type", "architecture")  # the first that is there decides
_WIDTH_KEYS = ("input_dim", "d_model")
_SIZE_KEYS = ("hidden_dim", "dict_size")
_RUNNING = "_running_threshold"
_JUMPS = ("jump_thresholds", "thresholds")  # as above


def recognise(content: Content) -> bool:
    """A layout with a tensor that only visaebench adds, or with its configuration."""
    if not could_be(content):
        return False
    if _RUNNING in content.names or _JUMPS[0] in content.names:
        return True
    _, config = _config(content)
    sized = any(key in config for key in (*_WIDTH_KEYS, *_SIZE_KEYS, "expansion_factor"))
    named = any(key in config for key in _KIND_KEYS) and "trainer" not in config
    return named and (sized or content.has(FINAL))


def could_be(content: Content) -> bool:
    """Whether it has the tensors of one of the layouts."""
    if content.has(FINAL, WEIGHTS):
        return True
    more = {"decoder.bias", _RUNNING, *_JUMPS}
    return content.has(*_SIMPLE) and content.names <= {*_SIMPLE, *more}


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (names, values or shapes that do not belong), SpecError."""
    state, (source, config) = content.objects, _config(content)
    exported = FINAL in state
    kind = _kind(state, config, source, facts)
    more = [name for name in (_RUNNING, *_JUMPS) if name in state]  # read by `_activation`
    _check_kind(kind, more)
    activation = _activation(kind, state, config, source, facts)
    shape = content.shape(FINAL if exported else _SIMPLE[0])
    _check_shape(shape, config, source)
    about = "m and s of u = (x − m)/s: the mean [d], and √(mean over d of the variances)"
    scaling = facts.ask_scaling(about, d=shape[1], estimate="standardise")
    facts.trained_on(model=config.get("backbone"), hook=config.get("layer"))
    if exported:
        parts = overcomplete_parts.ask(state, facts, ignored=more)
        facts.settle()
        return overcomplete_parts.assembled(parts, activation, kind, scaling)
    facts.always("pre_bias", False)
    facts.settle()
    floats = weights(state, _SIMPLE, ("decoder.bias",), ignored=more, what="a simple SAE")
    W_dec_sd = floats["decoder.weight"]
    return Sae(
        W_enc_ds=floats["encoder.weight"].T,
        b_enc_s=floats["encoder.bias"],
        W_dec_sd=W_dec_sd,
        b_dec_d=floats.get("decoder.bias", W_dec_sd.new_zeros(shape[1])),
        activation=activation,
        architecture=kind,
        scaling=scaling,
        stored_dtype=dtype_of(state["encoder.weight"]),
    )


def _config(content: Content) -> tuple[str, Mapping[str, Any]]:
    return content.config(*_CONFIGS)


def _kind(state: Mapping[str, Any], config: Mapping[str, Any], source: str, facts: Facts) -> str:
    """One of `_KINDS`. Errors: WeightsError for another one, which visaebench takes for topk."""
    key = next((key for key in _KIND_KEYS if config.get(key) is not None), None)
    if key is not None:
        kind = str(config[key]).lower()
        if kind not in _KINDS:
            raise WeightsError(
                f"{source} has {key} = {config[key]!r:.80}", f"known: {', '.join(_KINDS)}"
            )
        return facts.known("activation", kind, source)
    if _RUNNING in state:
        return facts.known("activation", "batchtopk")
    if any(name in state for name in _JUMPS):
        return facts.known("activation", "jumprelu")
    return facts.ask_choice("activation", "what is kept of relu(pre)", ("topk", "batchtopk"))


def _check_kind(kind: str, more: list[str]) -> None:
    """Errors: WeightsError for thresholds of another kind, which visaebench does not look at."""
    own = {"batchtopk": (_RUNNING,), "jumprelu": _JUMPS}.get(kind, ())
    if strange := [name for name in more if name not in own]:
        raise WeightsError(f"it is said to be {kind or 'topk'}, and holds {', '.join(strange)}")
    if kind == "jumprelu" and not more:
        raise WeightsError(
            f"it is a jumprelu SAE, and holds neither {_JUMPS[0]} nor {_JUMPS[1]}",
            "visaebench's loader takes 0.01 for all: nobody trained that",
        )


def _activation(
    kind: str, state: Mapping[str, Any], config: Mapping[str, Any], source: str, facts: Facts
) -> Activation:
    k = facts.known("k", whole(config["k"], "k"), source) if config.get("k") is not None else None
    if kind == "jumprelu":
        return _jump_relu(state, facts)
    if kind == "topk":
        return TopK(facts.ask_int("k", "the latents that a row keeps") if k is None else k)
    if kind != "batchtopk":
        facts.later("k", "threshold")
        return Threshold()
    if k is None:
        facts.may_count("k")  # for an estimate
    facts.always("strict", False)
    return Threshold(_threshold(state, config, source, facts), inclusive=True)


def _jump_relu(state: Mapping[str, Any], facts: Facts) -> Activation:
    name = next(name for name in _JUMPS if name in state)
    if FINAL in state and name == "thresholds":
        return overcomplete_parts.jump_relu(state[name], facts)
    facts.known("thresholds", name)
    facts.always("strict", True)
    return Threshold(overcomplete_parts.thresholds(state[name], name))


def _threshold(
    state: Mapping[str, Any], config: Mapping[str, Any], source: str, facts: Facts
) -> float:
    running = number(state[_RUNNING], _RUNNING) if _RUNNING in state else None
    if config.get("threshold") is not None:
        said = number(config["threshold"], "threshold")
        if running is not None and running != said:
            facts.note(
                f"{source} has threshold = {said:.6g}, which holds, and the file {running:.6g}"
            )
        return facts.known("threshold", said, source)
    if running is not None:
        return facts.known("threshold", running)
    about = "neither its configuration nor the file has one; visaebench's loader takes 0"
    return facts.ask_number("threshold", about, estimate="threshold")


def _check_shape(shape: tuple[int, ...], config: Mapping[str, Any], source: str) -> None:
    """Errors: WeightsError where the encoder [s d] is not what the configuration says."""
    if len(shape) != 2:
        raise WeightsError(f"the weight of its encoder has shape {list(shape)}, not [s d]")
    for size, keys in zip(shape, (_SIZE_KEYS, _WIDTH_KEYS), strict=True):
        for key in keys:
            if config.get(key) is not None and whole(config[key], key) != size:
                raise WeightsError(
                    f"{source} says {key} = {config[key]}, and the encoder is {list(shape)}"
                )
