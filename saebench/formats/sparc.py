"""SPARC: one dictionary for several streams (two image models, a text model), TopK.

    logits = (u − pre_s) @ E_s.T + latent_s      u = x/‖x‖, as the project's loader gives it
    z      = the k largest, ReLU                 x̂_t = z @ D_t.T + pre_t

A stream s is read, and decoded into itself, or into another (`target`): then x̂ is an estimate of
the other's vector at length 1. With several streams at
once the global variant takes the k of the sum of their logits; of one stream alone, as here, both
variants take its own. k is in run_config.json, if that lies beside the file.
"""

from __future__ import annotations

from saebench.activations import TopK
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, matrix, weights, whole
from saebench.inputs import Length, OneWay, Scaling
from saebench.saes import Sae

NAME = "sparc"
_RUN = "run_config.json"


def recognise(content: Content) -> bool:
    """By an encoder for each stream."""
    return bool(_streams(content))


def _streams(content: Content) -> list[str]:
    """The names of the streams that are there whole."""
    found = [
        name.removeprefix("encoders.").removesuffix(".weight")
        for name in content.names
        if name.startswith("encoders.") and name.endswith(".weight")
    ]
    return sorted(stream for stream in found if content.has(*_names(stream)))


def _names(stream: str) -> tuple[str, ...]:
    matrices = (f"encoders.{stream}.weight", f"decoders.{stream}.weight")
    return (*matrices, f"pre_biases.{stream}", f"latent_biases.{stream}")


def read(content: Content, facts: Facts) -> Sae:
    """Errors: SpecError (what is not stated), WeightsError (names, shapes)."""
    streams = _streams(content)
    stream = _stream(streams, facts)
    target = facts.may_choose("target", streams, stream)
    transcoder = target != stream
    facts.always("pre_bias", True)
    facts.always("activation", "topk")
    facts.always("input_length", "unit")
    source, run = content.config(_RUN)
    arguments = run.get("args", {})
    if isinstance(arguments, dict) and "k" in arguments:
        k = facts.known("k", whole(arguments["k"], "k"), source)
    else:
        k = facts.ask_int("k", "how many latents a row keeps")
    if len(streams) > 1:
        facts.note(
            f"only '{stream}' chooses the k latents; with several streams at once the global "
            "variant of the project chooses them by the sum of their logits"
        )
    facts.settle()
    statistics = {f"stats_last_nonzero_{one}" for one in streams}
    required = {name for one in streams for name in _names(one)}
    found = weights(content.objects, required, ignored=statistics, what="an SAE of SPARC")
    b_pre_d = found[f"pre_biases.{stream}"]
    return Sae(
        W_enc_ds=matrix(found, f"encoders.{stream}.weight").T,
        b_enc_s=found[f"latent_biases.{stream}"],
        W_dec_sd=matrix(found, f"decoders.{target}.weight").T,
        b_dec_d=found[f"pre_biases.{target}"],
        activation=TopK(k),
        architecture="topk",
        b_pre_d=b_pre_d,
        scaling=Scaling(rows=OneWay(Length(1.0)) if transcoder else Length(1.0)),
        transcoder=transcoder,
        stored_dtype=dtype_of(content.objects[f"encoders.{stream}.weight"]),
    )


def _stream(streams: list[str], facts: Facts) -> str:
    """The stream that is read."""
    if len(streams) == 1:
        return facts.known("stream", streams[0])
    return facts.ask_choice("stream", "which of its encoders reads x", streams) or streams[0]
