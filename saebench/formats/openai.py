"""OpenAI's sparse_autoencoder, and the class of its that MonoLoss copies: one .pt state dict.

    pre = (u − pre_bias) @ encoder.weight.T + latent_bias      u = x, or x layer-normed
    x̂   = act(pre) @ decoder.weight.T + pre_bias               layer norm undone

OpenAI's loader switches the layer norm on where the activation is TopK and off where it is ReLU,
however it was trained (their training script has none). What the class itself saves again holds
`activation.k` too, and so does MonoLoss's copy, whose inputs are of another length: such a file is
recognised by neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from saebench.activations import Activation, Threshold, TopK
from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, matrix, weights, whole
from saebench.inputs import LayerNorm, Scaling
from saebench.saes import Sae

NAME = "openai"
_WEIGHTS = ("pre_bias", "latent_bias", "encoder.weight")
_DECODERS = ("decoder.weight", "decoder.linear.weight")  # the second: the encoder's, when tied
_STATED = ("activation", "activation_state_dict", "activation.k", "activation.postact_fn")
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_WHOSE_NORM = (
    "the file does not say whether rows are layer-normed: OpenAI's loader does so with TopK and "
    "not with ReLU, their training script never; row_norm may be given"
)


def recognise(content: Content) -> bool:
    """An original file: `activation` and its state, and not what the class adds when it saves."""
    original = content.has(*_WEIGHTS, "activation", "activation_state_dict")
    return original and not content.has("activation.k")


def could_be(content: Content) -> bool:
    """A file of the class as it saves itself, which may be MonoLoss's."""
    return is_class(content.names)


def is_class(names: frozenset[str] | set[str]) -> bool:
    """Whether a state dict is one of the class with TopK, OpenAI's or a copy."""
    return names >= {*_WEIGHTS, "activation.k", "activation.postact_fn"}


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (an activation that is not known, names that do not belong)."""
    activation = class_activation(content.objects, facts)
    loaders = "layer_norm" if isinstance(activation, TopK) else "none"
    norm = facts.may_choose("row_norm", ("layer_norm", "none"), loaders)
    facts.note(_WHOSE_NORM)
    facts.settle()
    rows = LayerNorm() if norm == "layer_norm" else None
    return class_sae(content.objects, activation, Scaling(rows=rows))


def class_activation(objects: Mapping[str, Any], facts: Facts) -> Activation:
    """The activation that a state dict of the class states.

    Errors: WeightsError (not stated, not known, two k).
    """
    facts.always("pre_bias", True)
    stated = objects.get("activation", "TopK" if "activation.k" in objects else None)
    activation = facts.known("activation", str(stated))
    if activation == "ReLU":
        return Threshold()
    if activation != "TopK":
        raise WeightsError(f"its activation is {activation!r:.80}", "known: TopK, ReLU")
    state = objects.get("activation_state_dict", {})
    inside = [state] if isinstance(state, Mapping) and state else []
    if "activation.k" in objects:
        names = ("k", "postact_fn")
        inside.append({name: objects.get(f"activation.{name}") for name in names})
    ks = {whole(one.get("k"), "the k of its activation") for one in inside}
    afters = {str(one.get("postact_fn")) for one in inside}
    if len(ks) != 1 or len(afters) != 1:
        raise WeightsError(f"its TopK is said to be of k {sorted(ks)}, then {sorted(afters)}")
    k, after = facts.known("k", ks.pop()), facts.known("activation_after", afters.pop())
    if after not in ("ReLU", "Identity"):
        raise WeightsError(f"what follows its TopK is {after!r:.80}", "known: ReLU, Identity")
    return TopK(k, signed=after == "Identity")


def class_sae(objects: Mapping[str, Any], activation: Activation, scaling: Scaling) -> Sae:
    """The SAE of a state dict of the class. Errors: WeightsError (names, a tied decoder apart)."""
    known = (*_STATED, *_STATISTICS)
    found = weights(objects, _WEIGHTS, _DECODERS, ignored=known, what="an SAE of OpenAI's class")
    W_enc_sd = matrix(found, "encoder.weight")
    tied_sd = found.get("decoder.linear.weight", W_enc_sd)
    if tied_sd is not W_enc_sd and not torch.equal(tied_sd, W_enc_sd):
        raise WeightsError("decoder.linear.weight is not the encoder's, to which it is tied")
    return Sae(
        W_enc_ds=W_enc_sd.T,
        b_enc_s=found["latent_bias"],
        W_dec_sd=matrix(found, "decoder.weight").T if "decoder.weight" in found else W_enc_sd,
        b_dec_d=found["pre_bias"],
        activation=activation,
        architecture="topk" if isinstance(activation, TopK) else "relu",
        b_pre_d=found["pre_bias"],
        scaling=scaling,
        stored_dtype=dtype_of(objects["encoder.weight"]),
    )
