"""EleutherAI's sparsify: TopK and groupmax SAEs and transcoders.

    pre = (x − b_dec) @ W_enc + b_enc          a transcoder: x @ W_enc + b_enc
    z   = the k largest of ReLU(pre), or the largest of each of k groups of it;
          of files with the old `signed`: the k of largest |pre|, their sign kept
    x̂   = z @ W_dec + b_dec (+ x @ W_skip.T)

A folder holds sae.safetensors and cfg.json; the run's own config.json lies one folder up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saebench.activations import Activation, GroupMax, TopK
from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, flag, weights, whole
from saebench.saes import Sae

NAME = "sparsify"
_WEIGHTS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
_CFG = "cfg.json"


def recognise(content: Content) -> bool:
    """Whether it has a torch layer as its encoder and a bare matrix as its decoder."""
    return content.has(*_WEIGHTS) and content.rank("W_dec") == 2


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError, SpecError."""
    source, config = content.config(_CFG)
    k = _k(config, facts)
    kind = _kind(config, facts)
    transcodes = _transcodes(config, facts)
    facts.known("pre_bias", not transcodes, source or "given")
    unit = flag(config.get("normalize_decoder", True), "normalize_decoder")
    if config and unit and not transcodes:
        facts.promise("decoder_norm", "unit")
    _, run = content.config("config.json")
    facts.trained_on(model=run.get("model"), dataset=run.get("dataset"))
    facts.settle()

    floats = weights(content.objects, _WEIGHTS, ("W_skip",), what="a sparsify SAE")
    _check(config, floats)
    b_dec_d = floats["b_dec"]
    return Sae(
        W_enc_ds=floats["encoder.weight"].T,
        b_enc_s=floats["encoder.bias"],
        W_dec_sd=floats["W_dec"],
        b_dec_d=b_dec_d,
        activation=_activation(kind, k),
        architecture="groupmax" if kind == "groupmax" else "topk",
        b_pre_d=None if transcodes else b_dec_d,
        transcoder=transcodes,
        skip_dd=floats.get("W_skip"),
        stored_dtype=dtype_of(content.objects["encoder.weight"]),
    )


def _k(config: Mapping[str, Any], facts: Facts) -> int:
    if "k" in config:
        return facts.known("k", whole(config["k"], "k"), _CFG)
    return facts.ask_int("k", "the latents that are kept of a row, or the number of groups")


def _kind(config: Mapping[str, Any], facts: Facts) -> str:
    """topk, groupmax, or the signed topk of the first versions, whose cfg.json has `signed`."""
    if not config:
        return facts.ask_choice("activation", "what is kept", ("topk", "groupmax", "signed"))
    kind = config.get("activation", "topk")
    if kind not in ("topk", "groupmax"):
        raise WeightsError(f"{_CFG} has activation = {kind!r:.80}", "known: topk, groupmax")
    if flag(config.get("signed", False), "signed"):
        if kind == "groupmax":
            raise WeightsError(f"{_CFG} asks for groupmax and for signed, which exclude each other")
        kind = "signed"
    return facts.known("activation", kind, _CFG)


def _transcodes(config: Mapping[str, Any], facts: Facts) -> bool:
    if not config:
        return facts.ask_bool("transcode", "whether it estimates another activation than it reads")
    return facts.known("transcode", flag(config.get("transcode", False), "transcode"), _CFG)


def _activation(kind: str, k: int) -> Activation:
    if kind == "groupmax":
        return GroupMax(k)
    return TopK(k, signed=kind == "signed", by_magnitude=kind == "signed")


def _check(config: Mapping[str, Any], floats: Mapping[str, Any]) -> None:
    """Errors: WeightsError where cfg.json and the tensors are not of one SAE."""
    if not config:
        return
    s, d = floats["W_dec"].shape
    skips = flag(config.get("skip_connection", False), "skip_connection")
    if skips != ("W_skip" in floats):
        there = "is there" if "W_skip" in floats else "is not there"
        raise WeightsError(f"{_CFG} says skip_connection = {skips}, and W_skip {there}")
    width = whole(config.get("d_in", d), "d_in")
    latents = config.get("num_latents", 0)
    if latents == 0:  # then it is a multiple of the width
        latents = width * whole(config.get("expansion_factor"), "expansion_factor")
    if (width, whole(latents, "num_latents")) != (d, s):
        raise WeightsError(f"{_CFG} says {width} x {latents}, and the tensors are {d} x {s}")
