"""saev (OSU-NLP-Group): one line of JSON, then a torch archive of W_enc [d s], W_dec [s d], biases.

    z = ReLU(pre), the k largest of pre whatever their sign, or pre where pre > θ
    x̂ = z @ W_dec + b_dec         pre = (x − b_dec) @ W_enc + b_enc, later x @ W_enc + b_enc

The line (`saebench.formats.saev_line`) has a `schema`, which does not say all that changed. The
first files, of February 2025, have none: there b_dec is subtracted, and x was scaled in training.
Schema 1 saw both end: the scaling with commit c6a4602 (2025-07-17), the subtraction with e7ca004
(2025-07-31). Its BatchTopK stores a threshold since 2025-11-16 (schema 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.activations import Activation, Threshold, TopK
from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.saev_line import Line, check_sizes, parsed
from saebench.formats.tensors import dtype_of, flag, weights, whole
from saebench.inputs import Scaling
from saebench.saes import Sae

NAME = "saev"
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
_THRESHOLD = "activation.threshold"


def recognise(content: Content) -> bool:
    """Whether a line of JSON with a schema, or of saev's first configuration, precedes it."""
    line = content.header if content.container == "saev" else {}
    return "schema" in line or line.keys() >= {"d_vit", "exp_factor"}


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (another schema, names, sizes), SpecError (what is not stated)."""
    line = parsed(content.header)
    batch = (_THRESHOLD,) if line.activation == "BatchTopK" else ()
    found = weights(content.objects, _WEIGHTS, batch, what="an SAE of saev")
    W_enc_ds = found["W_enc"]
    check_sizes(line.config, W_enc_ds)
    subtracts = _subtracts(line, facts)
    scaling = _scaling(line, facts, W_enc_ds.shape[0])
    activation = _activation(line, facts, found.get(_THRESHOLD), W_enc_ds.shape[1])
    if flag(line.config.get("normalize_w_dec", True), "normalize_w_dec"):
        facts.promise("decoder_norm", "unit")
    if line.schema:
        facts.note("the file does not say whether it is Matryoshka; all its latents are decoded")
    if line.schema == 2:
        facts.note("Matryoshka SAEs of before 2025-09-05 were trained on x − b_dec; saev reads x")
    facts.settle()
    return Sae(
        W_enc_ds=W_enc_ds,
        b_enc_s=found["b_enc"],
        W_dec_sd=found["W_dec"],
        b_dec_d=found["b_dec"],
        activation=activation,
        architecture=_architecture(activation, line.activation),
        b_pre_d=found["b_dec"] if subtracts else None,
        scaling=scaling,
        stored_dtype=dtype_of(content.objects["W_enc"]),
    )


# --- what the line leaves open ------------------------------------------------------------------


def _subtracts(line: Line, facts: Facts) -> bool:
    if line.schema == 1 and not line.after and (line.within or not line.dated):
        about = (
            "whether b_dec is subtracted before the encoder: files of schema 1 of before "
            f"2025-07-31 do, later ones do not; this one is of commit '{line.commit:.40}'"
        )
        return facts.ask_bool("pre_bias", about)
    return facts.known("pre_bias", not line.after)


def _scaling(line: Line, facts: Facts, d: int) -> Scaling:
    if line.after:
        facts.always("input", "raw")
        return Scaling()
    about = (
        "until 2025-07-17 training took (x − mean) / (mean norm / √d) by default, and the file "
        "does not hold them"
    )
    return facts.ask_scaling(about, d=d, estimate="mean_norm")


def _activation(line: Line, facts: Facts, theta: Tensor | None, s: int) -> Activation:
    if line.activation == "Relu":
        facts.known("activation", "relu")
        return Threshold()
    k = facts.known("k", whole(line.params.get("top_k", 32), "top_k"))
    if line.activation == "TopK":
        facts.known("activation", "topk")
        return _signed(k, facts, s)
    if theta is None:
        return _without_threshold(line, facts, k, s)
    if theta.ndim:
        raise WeightsError(f"{_THRESHOLD} has shape {list(theta.shape)}, and is one number")
    facts.known("activation", "batchtopk")
    facts.known("threshold", float(theta))
    facts.always("strict", True)
    return Threshold(theta)


def _signed(k: int, facts: Facts, s: int) -> TopK:
    facts.always("signed", True)
    return TopK(min(k, s), signed=True)  # the library takes all where there are fewer than k


def _without_threshold(line: Line, facts: Facts, k: int, s: int) -> Activation:
    """A BatchTopK of before 2025-11-16: for months the k largest of each row, under that name."""
    about = (
        "what its BatchTopK did: from 2025-08-07 to 2025-11-16 it took the k largest of each row "
        "(topk), before and after those of a batch (batchtopk)"
    )
    if line.schema == 3:
        kind = facts.known("activation", "topk")
    elif line.schema == 1:
        kind = facts.known("activation", "batchtopk")
    else:
        kind = facts.ask_choice("activation", about, ("topk", "batchtopk"))
    if kind == "topk":
        facts.note("its BatchTopK is that of 2025-08-07 to 2025-11-16: the k largest of each row")
        return _signed(k, facts, s)
    if kind == "batchtopk":
        facts.always("strict", True)
        theta = facts.ask_number("threshold", "the file stores none", estimate="threshold")
        return Threshold(torch.tensor(theta))
    return Threshold()  # while nobody says what it was


def _architecture(activation: Activation, name: str) -> str:
    if isinstance(activation, TopK):
        return "topk"
    return "batchtopk" if name == "BatchTopK" else "relu"
