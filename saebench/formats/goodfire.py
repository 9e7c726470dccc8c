"""Goodfire: a state dict of two linear layers and a ReLU.

z = relu(x @ encoder_linear.weight.T + encoder_linear.bias)
x̂ = z @ decoder_linear.weight.T + decoder_linear.bias
"""

from __future__ import annotations

from saebench.activations import Threshold
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, matrix, weights
from saebench.saes import Sae

NAME = "goodfire"
_WEIGHTS = (
    *("encoder_linear.weight", "encoder_linear.bias"),
    *("decoder_linear.weight", "decoder_linear.bias"),
)


def recognise(content: Content) -> bool:
    """By the names of its layers."""
    return content.has(*_WEIGHTS)


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (names, shapes)."""
    facts.always("pre_bias", False)
    facts.always("activation", "relu")
    facts.always("input", "raw")
    facts.settle()
    found = weights(content.objects, _WEIGHTS, what="an SAE of Goodfire")
    return Sae(
        W_enc_ds=matrix(found, "encoder_linear.weight").T,
        b_enc_s=found["encoder_linear.bias"],
        W_dec_sd=matrix(found, "decoder_linear.weight").T,
        b_dec_d=found["decoder_linear.bias"],
        activation=Threshold(),
        architecture="relu",
        stored_dtype=dtype_of(content.objects["encoder_linear.weight"]),
    )
