"""CLIP-Scope: {n_features, d_in, k, model_state_dict} with pre_b, enc, dec.

    z = the k largest of (u − pre_b) @ enc, whatever their sign       x̂ = z @ dec + pre_b

No encoder bias, no ReLU. In training every coordinate was z-scored with the mean and the unbiased
deviation (+ 1e-6) of its batch, and that is not in the file. Checkpoints of a training have other
keys beside the state dict, and no k.
"""

from __future__ import annotations

from torch import Tensor

from saebench.activations import TopK
from saebench.errors import WeightsError
from saebench.formats.content import Content, refuse_unknown
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, matrix, weights, whole
from saebench.saes import Sae

NAME = "clip-scope"
_WEIGHTS = ("pre_b", "enc", "dec")
_STATE = "model_state_dict"
_TRAINING = {"optimizer_state_dict", "token_count", "dead_latents", "n_iter", "log_id"}


def recognise(content: Content) -> bool:
    """The published files, training checkpoints, and the state dict alone."""
    return content.has(*_WEIGHTS) or set(_WEIGHTS) <= set(content.nested(_STATE))


def read(content: Content, facts: Facts) -> Sae:
    """Errors: SpecError (what is not stated), WeightsError (names, shapes)."""
    wrapped = content.has(_STATE)
    state = content.nested(_STATE) if wrapped else content.objects
    if wrapped:
        known = {"n_features", "d_in", "k", _STATE, *_TRAINING}
        refuse_unknown(content.names, known, "a file of CLIP-Scope")
    found = weights(state, _WEIGHTS, what="an SAE of CLIP-Scope")
    W_enc_ds = matrix(found, "enc")
    _check_shape(content, W_enc_ds)
    facts.always("pre_bias", True)
    facts.always("activation", "TopK")
    facts.always("signed", True)
    if wrapped and content.has("k"):
        k = facts.known("k", whole(content.objects["k"], "k"))
    else:
        k = facts.ask_int("k", "how many latents a row keeps: 32 in the published files")
    about = "its makers z-scored every coordinate, with the statistics of each training batch"
    scaling = facts.ask_scaling(about, d=found["pre_b"].numel(), estimate="zscore")
    facts.settle()
    return Sae(
        W_enc_ds=W_enc_ds,
        b_enc_s=W_enc_ds.new_zeros(W_enc_ds.shape[1]),
        W_dec_sd=found["dec"],
        b_dec_d=found["pre_b"],
        activation=TopK(k, signed=True),
        architecture="topk",
        b_pre_d=found["pre_b"],
        scaling=scaling,
        stored_dtype=dtype_of(state["enc"]),
    )


def _check_shape(content: Content, W_enc_ds: Tensor) -> None:
    """Errors: WeightsError where enc is not of the size that is announced."""
    for name, size in zip(("d_in", "n_features"), W_enc_ds.shape, strict=True):
        if content.has(_STATE, name) and whole(content.objects[name], name) != size:
            raise WeightsError(f"{name} is {content.objects[name]}, and enc {list(W_enc_ds.shape)}")
