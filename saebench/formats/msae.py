"""MSAE: {model, mean_center, scaling_factor, target_norm}, and the rest in the file's name.

    u   = (x − mean_center)·scaling_factor, layer-normed where `normalize`
    pre = (u − pre_bias) @ encoder + latent_bias
    z   = c·tanh(act(pre)/c) with a soft cap c, else act(pre)
    x̂   = z @ decoder + pre_bias, all of it undone         tied: decoder = encoder.T

A name is {n}_{d}_{activation}[_{k}][_UW|_RW]_{tied}_{normalize}_{soft cap}_{dataset}.pth. UW and RW
(Matryoshka) are the same weights under several k, of which the name has the smallest: which is
meant has to be said, or activation = "ReLU" for the project's "full" output without any top-k.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saebench.activations import Absolute, Activation, Squash, Threshold, TopK
from saebench.errors import SpecError, WeightsError
from saebench.formats.content import Content, refuse_unknown
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, float32, matrix, number, weights
from saebench.inputs import LayerNorm, Scaling
from saebench.saes import Sae

NAME = "msae"
_NEEDED = ("pre_bias", "encoder", "latent_bias")
_LOG_THRESHOLD = "activation.log_threshold"
# Counts, and the activation again: its module has two names.
_UNUSED = ("latents_activation_frequency", "dead_activations.log_threshold")
_WRAPPER = {"model", "mean_center", "scaling_factor", "target_norm"}
_TOPK = ("TopKReLU", "TopK", "TopKabs", "TopKabsReLU")
_NORMS = ("none", "layer_norm")
_FULL_IS_RELU = ("ReLU", "TopKReLU", "BatchTopKReLU")  # their output without any top-k
_PATTERN = re.compile(
    r"(?P<n>\d+)_(?P<d>\d+)_(?P<activation>[A-Za-z]+)(_(?P<k>\d+))?(_(?P<nested>UW|RW))?"
    r"_(?P<tied>True|False)_(?P<normalize>True|False)_(?P<soft_cap>\d+(\.\d+)?)_"
)


def recognise(content: Content) -> bool:
    """Its wrapper, or the state dict alone, whose encoder is a bare matrix."""
    if content.has("model", "mean_center", "scaling_factor"):
        return set(_NEEDED) <= set(content.nested("model"))
    return content.has(*_NEEDED) and content.rank("encoder") == 2


def read(content: Content, facts: Facts) -> Sae:
    """Errors: SpecError (what is not stated, BatchTopK), WeightsError (names, shapes)."""
    wrapped = content.has("model")
    state = content.nested("model") if wrapped else content.objects
    known = (_LOG_THRESHOLD, "decoder")
    found = weights(state, _NEEDED, known, ignored=_UNUSED, what="an SAE of MSAE")
    W_enc_ds = matrix(found, "encoder")
    named = _named(content.path.name, W_enc_ds, tied="decoder" not in found)
    facts.always("pre_bias", True)
    facts.known("tied", "decoder" not in found)
    activation, architecture = _activation(named, found.get(_LOG_THRESHOLD), facts)
    rows = _rows(named, facts)
    if wrapped:
        refuse_unknown(content.names, _WRAPPER, "a file of MSAE")
        scaling = _stored_scaling(content.objects, W_enc_ds.shape[0], rows, facts)
    else:
        about = "its mean_center and scaling_factor (1/input_std) were in the wrapper"
        scaling = facts.ask_scaling(about, d=W_enc_ds.shape[0], rows=rows)
    facts.settle()
    return Sae(
        W_enc_ds=W_enc_ds,
        b_enc_s=found["latent_bias"],
        W_dec_sd=found.get("decoder", W_enc_ds.T),
        b_dec_d=found["pre_bias"],
        activation=activation,
        architecture=architecture,
        b_pre_d=found["pre_bias"],
        scaling=scaling,
        stored_dtype=dtype_of(state["encoder"]),
    )


def _named(name: str, W_enc_ds: Tensor, *, tied: bool) -> Mapping[str, Any]:
    """What the file's name says, where it is a documented name and that of these weights."""
    parsed = _PATTERN.match(name)
    if parsed is None:
        return {}
    shape = [int(parsed["d"]), int(parsed["n"])]
    ours = shape == list(W_enc_ds.shape) and (parsed["tied"] == "True") == tied
    return parsed.groupdict() if ours else {}


def _activation(
    named: Mapping[str, Any], log_threshold_s: Tensor | None, facts: Facts
) -> tuple[Activation, str]:
    """The activation with its soft cap, and the architecture."""
    name, architecture = _name_of(named, log_threshold_s, facts), "relu"
    inner: Activation = Threshold()
    if log_threshold_s is not None:
        inner, architecture = Threshold(log_threshold_s.exp()), "jumprelu"
    elif name in _TOPK:
        k = _k(named, facts)
        nested = named.get("nested")
        architecture = "matryoshka-topk" if nested else "topk"
        inner = TopK(k, signed=name == "TopK")
        inner = Absolute(inner) if "abs" in name else inner
    about = "c of c·tanh(z/c), 0 for none"
    if named:
        cap = facts.may_number("soft_cap", float(named["soft_cap"]), "file name")
    else:
        cap = facts.ask_number("soft_cap", about)
    if not 0 <= cap < float("inf"):
        raise SpecError(f"soft_cap = {cap}", f"{about}: not below 0")
    return (Squash(inner, cap) if cap else inner), architecture


def _name_of(named: Mapping[str, Any], log_threshold_s: Tensor | None, facts: Facts) -> str:
    """ReLU, JumpReLU, or one of `_TOPK`. Errors: SpecError for any other."""
    if log_threshold_s is not None:
        return facts.known("activation", "JumpReLU")
    if named:
        choices = ("ReLU", *_TOPK)
        name = facts.may_choose("activation", choices, named["activation"], "file name")
    else:
        about = 'which of its activations it has; "ReLU" is also the full output of a TopK SAE'
        return facts.ask_choice("activation", about, ("ReLU", *_TOPK))
    if name == "JumpReLU":
        raise WeightsError("its name says JumpReLU, and it holds no activation.log_threshold")
    if name.startswith("BatchTopK"):
        full = 'activation = "ReLU" reads its full output, without any top-k'
        raise SpecError(
            f"its activation is {name}: the k·B largest of a batch, in evaluation too, so that a "
            "code depends on the other rows",
            full if name in _FULL_IS_RELU else "use another checkpoint of the family",
        )
    if name == "ReLU" and named["activation"] not in _FULL_IS_RELU:
        raise SpecError(
            f"activation = 'ReLU' is given, and the file name says {named['activation']}, whose "
            "full output is not that of a ReLU",
        )
    if name not in ("ReLU", *_TOPK):
        raise SpecError(f"its activation is {name!r}", f"known: ReLU, JumpReLU, {', '.join(_TOPK)}")
    return name


def _k(named: Mapping[str, Any], facts: Facts) -> int:
    """k of the name; of a Matryoshka SAE the name has only the smallest, so that it is asked."""
    if named.get("nested"):
        facts.note(f"its nested k begin at {named['k']}; all share the same weights")
        about = f"Matryoshka: one of its nested k (the smallest is {named['k']})"
        return facts.ask_int("k", about)
    if named.get("k") and named["activation"] in _TOPK:
        return facts.may_int("k", int(named["k"]), "file name")
    return facts.ask_int("k", "how many latents a row keeps")


def _rows(named: Mapping[str, Any], facts: Facts) -> LayerNorm | None:
    """A layer norm behind the scaling, where `normalize`."""
    if named:
        said = "layer_norm" if named["normalize"] == "True" else "none"
        norm = facts.may_choose("row_norm", _NORMS, said, "file name")
    else:
        about = "whether rows are layer-normed behind the scaling (normalize)"
        norm = facts.ask_choice("row_norm", about, _NORMS)
    return LayerNorm() if norm == "layer_norm" else None


def _stored_scaling(
    objects: Mapping[str, Any], d: int, rows: LayerNorm | None, facts: Facts
) -> Scaling:
    """(x − mean_center)·scaling_factor, as the wrapper has them."""
    mean_d = float32(objects["mean_center"], "mean_center")
    if list(mean_d.shape) != [d]:
        raise WeightsError(f"mean_center has shape {list(mean_d.shape)}, and encoder reads {d}")
    factor = float(number(objects["scaling_factor"], "scaling_factor"))
    if factor == 0:
        raise WeightsError("scaling_factor is 0")
    facts.known("input", "(x − mean_center)·scaling_factor")
    facts.known("scaling_factor", factor)
    return Scaling(mean_d, factor, rows)
