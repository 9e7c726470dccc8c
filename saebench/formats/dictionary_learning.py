"""dictionary_learning's seven classes, as SAEBench and sae-for-vlm use them too.

    AutoEncoder             relu((x − b) @ E + e)
    AutoEncoderNew          relu(x @ E + e)
    GatedAutoEncoder        relu(exp(r)·u + mag) where u + gate > 0, u = (x − b) @ E
    JumpReluAutoEncoder     pre where it is above max(θ, 0), pre = x @ E + e, θ [s]
    AutoEncoderTopK         the k largest of relu((x − b) @ E + e); it has a θ and does not use it
    BatchTopKSAE            relu((x − b) @ E + e) where it is above θ; θ < 0 was never set: ReLU
    MatryoshkaBatchTopKSAE  as BatchTopKSAE, all groups active

and x̂ = z @ D + b. trainer_<i>/ae.pt, or trainer_<i>/checkpoints/ae_<step>.pt, is a state dict, and
trainer_<i>/config.json names the class. The ae.pt of a run that was cut short is a backup: the same
state dict under `ae`, trained on x / norm_factor. It takes raw x once its biases and θ are
multiplied by norm_factor, which the library does at the end of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from saebench.activations import Activation, Gated, Threshold, TopK
from saebench.errors import WeightsError
from saebench.formats.content import Content, refuse_unknown
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, number, weights, whole
from saebench.saes import Sae

NAME = "dictionary_learning"
_BACKUP = ("step", "ae", "optimizer", "config", "norm_factor")
_CONFIG = "config.json"


@dataclass(frozen=True)
class _Class:
    """What a class calls its tensors. `linear`: two layers of torch, else matrices, x @ W."""

    architecture: str
    b_dec: str
    scaled: tuple[str, ...]  # biases of the encoder and thresholds: what is in the unit of x
    more: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()  # what is no weight, or has no say
    linear: bool = True
    pre_bias: bool = True
    unit: bool = True  # the trainer keeps the rows of the decoder at length 1

    @property
    def matrices(self) -> tuple[str, str]:
        return ("encoder.weight", "decoder.weight") if self.linear else ("W_enc", "W_dec")

    @property
    def weights(self) -> set[str]:
        return {*self.matrices, self.b_dec, *self.scaled, *self.more}


_CLASSES = {
    "AutoEncoder": _Class("relu", "bias", ("encoder.bias",), unit=False),
    "AutoEncoderNew": _Class("relu", "decoder.bias", ("encoder.bias",), pre_bias=False, unit=False),
    "GatedAutoEncoder": _Class(
        "gated", "decoder_bias", ("gate_bias", "mag_bias"), ("r_mag",), unit=False
    ),
    "JumpReluAutoEncoder": _Class(
        "jumprelu", "b_dec", ("b_enc", "threshold"), linear=False, pre_bias=False
    ),
    "AutoEncoderTopK": _Class("topk", "b_dec", ("encoder.bias",), unread=("k", "threshold")),
    "BatchTopKSAE": _Class("batchtopk", "b_dec", ("encoder.bias", "threshold"), unread=("k",)),
    "MatryoshkaBatchTopKSAE": _Class(
        "matryoshka-batchtopk",
        "b_dec",
        ("b_enc", "threshold"),
        unread=("k", "group_sizes"),
        linear=False,
    ),
}
_TIED = ("AutoEncoderTopK", "BatchTopKSAE")  # the same names in both
_NEED_A_CONFIG = ("AutoEncoderNew", "JumpReluAutoEncoder")  # other formats have their names too


def recognise(content: Content) -> bool:
    """Whether its names are a class's and no other format's, or its configuration says so."""
    if content.has(*_BACKUP):
        return True
    possible = _possible(content.names)
    sure = not set(possible) & {*_NEED_A_CONFIG} and (possible != list(_TIED) or content.has("k"))
    return bool(possible) and (sure or bool(_trainer(content)[1]))


def could_be(content: Content) -> bool:
    """Whether its names are those of a class."""
    return bool(_possible(content.names))


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError, SpecError."""
    source, trainer = _trainer(content)
    backup = content.has(*_BACKUP)
    if backup:
        refuse_unknown(content.names, {*_BACKUP}, "a backup")
    state = content.nested("ae") if backup else content.objects
    name = _class_name(frozenset(state), trainer, source, facts)
    kind = _CLASSES[name]
    k = _k(state, trainer, source, facts, asked=kind.architecture == "topk")
    facts.known("activation", kind.architecture, source or "file")
    facts.known("pre_bias", kind.pre_bias, source or "file")
    if kind.unit:
        facts.promise("decoder_norm", "unit")
    threshold = _threshold(kind, state, facts)
    factor = _factor(content, facts) if backup else 1.0
    transcodes = _transcodes(content, facts)
    _say_where_from(trainer, facts)
    facts.settle()

    if threshold is not None:
        state = {**state, "threshold": torch.tensor(threshold)}
    floats = weights(state, kind.weights, ignored=kind.unread, what=f"a file of {name}")
    if factor != 1:
        floats |= {name: floats[name] * factor for name in (kind.b_dec, *kind.scaled)}
    W_enc, W_dec = (floats[name].T if kind.linear else floats[name] for name in kind.matrices)
    b_dec_d = floats[kind.b_dec]
    gated = kind.architecture == "gated"
    return Sae(
        W_enc_ds=W_enc,
        b_enc_s=torch.zeros_like(floats["r_mag"]) if gated else floats[kind.scaled[0]],
        W_dec_sd=W_dec,
        b_dec_d=b_dec_d,
        activation=_activation(kind, floats, k),
        architecture=kind.architecture,
        b_pre_d=b_dec_d if kind.pre_bias else None,
        transcoder=transcodes,
        prefixes=_prefixes(state.get("group_sizes")),
        stored_dtype=dtype_of(state[kind.matrices[0]]),
    )


def _possible(names: frozenset[str]) -> list[str]:
    """The classes that a state dict can be of. The first TopK SAEs stored neither k nor θ."""
    return [
        name
        for name, kind in _CLASSES.items()
        if kind.weights - ({"threshold"} if name in _TIED else set())
        <= names
        <= kind.weights | set(kind.unread)
        and (name != "MatryoshkaBatchTopKSAE" or "group_sizes" in names)
    ]


def _trainer(content: Content) -> tuple[str, Mapping[str, Any]]:
    """What the run's configuration says of the trainer, and where; ("", {}) where nothing does."""
    if content.has(*_BACKUP):
        return "file", content.nested("config")
    source, config = content.config(_CONFIG)
    trainer = config.get("trainer")
    return (source, trainer) if isinstance(trainer, Mapping) else ("", {})


def _class_name(
    names: frozenset[str], trainer: Mapping[str, Any], source: str, facts: Facts
) -> str:
    possible = _possible(names)
    stated = str(trainer.get("dict_class") or "").replace("Matroyshka", "Matryoshka")
    if not possible:
        raise WeightsError(
            f"no class of dictionary_learning has the tensors {', '.join(sorted(names)[:9])}"
        )
    if stated in possible:
        return facts.known("dict_class", stated, source)
    # The trainers of ReLU SAEs write AutoEncoder, whichever of the two classes they train.
    if stated and not (stated == "AutoEncoder" and possible == ["AutoEncoderNew"]):
        raise WeightsError(
            f"{source} says dict_class = '{stated[:80]}', and the tensors are those of "
            f"{' or '.join(possible)}",
            "the configuration is another run's",
        )
    if len(possible) == 1:
        return facts.known("dict_class", possible[0], "file")
    return facts.ask_choice("dict_class", "which class it is of", possible) or possible[0]


def _k(
    state: Mapping[str, Any], trainer: Mapping[str, Any], source: str, facts: Facts, *, asked: bool
) -> int:
    """Errors: WeightsError where file and configuration disagree, as the library has it."""
    found = {
        where: whole(said["k"], "k")
        for where, said in (("file", state), (source, trainer))
        if said.get("k") is not None
    }
    if len(set(found.values())) > 1:
        raise WeightsError(
            f"the file says k = {found['file']}, and {source} k = {found[source]}",
            "the configuration is another run's",
        )
    for where, k in found.items():
        if not asked:
            facts.note(f"trained with k = {k} latents a row on average")
        return facts.known("k", k, where)
    return facts.ask_int("k", "the latents that are kept of a row") if asked else 0


def _threshold(kind: _Class, state: Mapping[str, Any], facts: Facts) -> float | None:
    """The scalar threshold of the BatchTopK classes; None for the others."""
    if "threshold" in kind.scaled:
        facts.always("strict", True)
    if "batchtopk" not in kind.architecture:
        return None
    if "threshold" not in state:
        about = "what a latent has to exceed"
        return facts.ask_number("threshold", about, estimate="threshold")
    theta = facts.known("threshold", number(state["threshold"], "threshold"))
    if theta < 0:
        facts.note("its threshold was never set in training: it is a plain ReLU")
    return theta


def _factor(content: Content, facts: Facts) -> float:
    """What a backup's biases and thresholds are multiplied by."""
    found = content.objects["norm_factor"]
    factor = 1.0 if found is None else number(found, "norm_factor")
    if not 0 < factor < float("inf"):
        raise WeightsError(f"norm_factor is {factor}, not a number above 0")
    facts.note("a backup of a run in progress: its biases were multiplied by norm_factor")
    return facts.known("norm_factor", factor)


def _transcodes(content: Content, facts: Facts) -> bool:
    """Whether the buffer gave the input and the output of a submodule."""
    source, config = content.config(_CONFIG)
    buffer = config.get("buffer")
    if not isinstance(buffer, Mapping) or buffer.get("io") != "in_and_out":
        return False
    return facts.known("transcoder", True, source)


def _say_where_from(trainer: Mapping[str, Any], facts: Facts) -> None:
    hook = trainer.get("submodule_name")
    if hook is None and trainer.get("layer") is not None:
        hook = f"layer {trainer['layer']}"
    facts.trained_on(model=trainer.get("lm_name"), hook=hook)


def _activation(kind: _Class, floats: Mapping[str, Tensor], k: int) -> Activation:
    if kind.architecture == "gated":
        return Gated(floats["gate_bias"], floats["r_mag"], floats["mag_bias"])
    if kind.architecture == "topk":
        return TopK(k)
    return Threshold(floats["threshold"]) if "threshold" in floats else Threshold()


def _prefixes(group_sizes: Any) -> tuple[int, ...]:
    """The ends of the groups, whose sizes the file holds."""
    if not isinstance(group_sizes, Tensor) or group_sizes.ndim != 1:
        return ()
    return tuple(accumulate(whole(size, "a group's size") for size in group_sizes.tolist()))
