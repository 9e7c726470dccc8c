"""Discover-then-Name: a state dict of the ai-safety-foundation library, with a component axis.

    f = relu((x − tied_bias) @ We.T + be)      x̂ = f @ Wd.T + tied_bias      Wd: unit columns

We = encoder._weight[0] [n d], Wd = decoder._weight[0] [d n]. The tied bias is stored three times.
"""

from __future__ import annotations

import torch

from saebench.activations import Threshold
from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, matrix, weights
from saebench.saes import Sae

NAME = "discover-then-name"
_BIAS = "tied_bias"
_COPIES = ("pre_encoder_bias._bias_reference", "post_decoder_bias._bias_reference")
_LAYERS = ("encoder._weight", "encoder._bias", "decoder._weight")


def recognise(content: Content) -> bool:
    """By the tied bias and an encoder of rank 3."""
    return content.has(_BIAS) and content.rank("encoder._weight") == 3


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (several components, biases that differ, names, shapes)."""
    facts.always("pre_bias", True)
    facts.always("activation", "relu")
    facts.always("input", "raw")
    facts.promise("decoder_norm", "unit")
    facts.settle()
    names = (_BIAS, *_COPIES, *_LAYERS)
    stored = weights(content.objects, names, what="an SAE of Discover-then-Name")
    for name, tensor in stored.items():
        if tensor.ndim < 2 or tensor.shape[0] != 1:
            raise WeightsError(
                f"{name} has shape {list(tensor.shape)}: that is not one component",
                "save one component as a file of its own: {name: t[i : i + 1] for …}",
            )
    found = {name: tensor[0] for name, tensor in stored.items()}
    if differing := [name for name in _COPIES if not torch.equal(found[name], found[_BIAS])]:
        raise WeightsError(f"{', '.join(differing)} is not the tied_bias, which it has to be")
    return Sae(
        W_enc_ds=matrix(found, "encoder._weight").T,
        b_enc_s=found["encoder._bias"],
        W_dec_sd=matrix(found, "decoder._weight").T,
        b_dec_d=found[_BIAS],
        activation=Threshold(),
        architecture="relu",
        b_pre_d=found[_BIAS],
        stored_dtype=dtype_of(content.objects["encoder._weight"]),
    )
