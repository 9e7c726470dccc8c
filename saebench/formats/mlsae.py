"""mlsae: config.json and model.safetensors of the hub mixin; one SAE for all layers of a model.

    z = the k largest of (u − pre_encoder_bias) @ encoder.weight.T, ReLU      u = LN(x), or x
    x̂ = z @ decoder.weight.T + pre_encoder_bias, layer norm undone            unit columns

`standardize` in the configuration is the layer norm. The class's `encode` gives values before the
ReLU; here as everywhere they are those that are decoded.
"""

from __future__ import annotations

from saebench.activations import TopK
from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, flag, matrix, weights, whole
from saebench.inputs import LayerNorm, Scaling
from saebench.saes import Sae

NAME = "mlsae"
_WEIGHTS = ("pre_encoder_bias", "encoder.weight", "decoder.weight")
_LAST = "last_nonzero"


def recognise(content: Content) -> bool:
    """By a bias of its own name, and the count that training keeps."""
    return content.has(*_WEIGHTS, _LAST) and content.rank("pre_encoder_bias") == 1


def read(content: Content, facts: Facts) -> Sae:
    """Errors: SpecError (what is not stated), WeightsError (names, shapes)."""
    source, config = content.config("config.json")
    facts.always("pre_bias", True)
    facts.always("activation", "topk")
    facts.promise("decoder_norm", "unit")
    facts.note("one SAE for the activations of all layers of its model")
    if "k" in config:
        k = facts.known("k", whole(config["k"], "k"), source)
    else:
        k = facts.ask_int("k", "how many latents a row keeps")
    if "standardize" in config:
        said = "layer_norm" if flag(config["standardize"], "standardize") else "none"
        norm = facts.known("row_norm", said, source)
    else:
        about = "whether rows are layer-normed (standardize)"
        norm = facts.ask_choice("row_norm", about, ("layer_norm", "none"))
    facts.settle()
    objects = content.objects
    found = weights(objects, _WEIGHTS, ignored=(_LAST,), what="an SAE of mlsae")
    W_enc_ds, b_d = matrix(found, "encoder.weight").T, found["pre_encoder_bias"]
    for name, size in zip(("n_inputs", "n_latents"), W_enc_ds.shape, strict=True):
        if config.get(name, size) != size:
            raise WeightsError(f"{source} says {name} {config[name]!r:.20}, the encoder has {size}")
    return Sae(
        W_enc_ds=W_enc_ds,
        b_enc_s=W_enc_ds.new_zeros(W_enc_ds.shape[1]),
        W_dec_sd=matrix(found, "decoder.weight").T,
        b_dec_d=b_d,
        activation=TopK(k),
        architecture="topk",
        b_pre_d=b_d,
        scaling=Scaling(rows=LayerNorm() if norm == "layer_norm" else None),
        stored_dtype=dtype_of(objects["encoder.weight"]),
    )
