"""Gemma Scope: params.npz, JumpReLU, no pre-bias.

    pre = x @ W_enc + b_enc      z = pre where pre > threshold      x̂ = z @ W_dec + b_dec

Names are sometimes in lower case. That it is a transcoder shows only in the name of its repository,
that it is one of the embedding SAEs only in the name of its folder: their input is scaled by √d,
and whether x is so already is asked for.
"""

from __future__ import annotations

from pathlib import Path

from saebench.activations import Threshold
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, matrix, weights
from saebench.inputs import Scaling
from saebench.saes import Sae

NAME = "gemma-scope"
_NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
_ALL = {*_NAMES, "threshold"}


def recognise(content: Content) -> bool:
    """NumPy's archive, with the five names in either case."""
    return content.container == "npz" and {name.lower() for name in content.names} >= _ALL


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (names, shapes), SpecError (an embedding SAE's input scale)."""
    renamed = {_NAMES.get(name.lower(), name): value for name, value in content.objects.items()}
    required = (*_NAMES.values(), "threshold")
    found = weights(renamed, required, what="an SAE of Gemma Scope")
    W_enc_ds = matrix(found, "W_enc")
    facts.always("pre_bias", False)
    facts.always("activation", "jumprelu")
    facts.always("strict", True)
    transcoder = facts.may_bool("transcoder", _in_transcoders(content.path), "file name")
    if _is_embedding(content.path):
        about = f"an embedding SAE, trained on embeddings scaled by √d = √{W_enc_ds.shape[0]}"
        scaling = facts.ask_scaling(about, d=W_enc_ds.shape[0])
    else:
        facts.always("input", "raw")
        scaling = Scaling()
    facts.settle()
    return Sae(
        W_enc_ds=W_enc_ds,
        b_enc_s=found["b_enc"],
        W_dec_sd=found["W_dec"],
        b_dec_d=found["b_dec"],
        activation=Threshold(found["threshold"]),
        architecture="jumprelu",
        scaling=scaling,
        transcoder=transcoder,
        stored_dtype=dtype_of(renamed["W_enc"]),
    )


def _in_transcoders(path: Path) -> bool:
    """Whether it lies in a repository like gemma-scope-2b-pt-transcoders."""
    return any("gemma-scope" in part and "transcoder" in part for part in path.absolute().parts)


def _is_embedding(path: Path) -> bool:
    """Whether it lies in embedding/width_…/average_l0_…"""
    return path.absolute().parts[-4:-3] == ("embedding",)
