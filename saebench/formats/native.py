"""saebench's own format: safetensors whose header says what the numbers alone cannot.

Header metadata: format = "saebench", version, config. Version 2 says all that an SAE can be
(`saebench.formats.parts`). Version 1, which is written where it suffices, has as config JSON with
    architecture, d_model, d_sae, pre_bias, scale    always
    k, signed                                        topk
    prefixes                                         matryoshka-batchtopk
    extra                                            whatever the writer adds; never read as meaning
Tensors: W_enc [d s], b_enc [s], W_dec [s d], b_dec [d]; mean [d] of the input scaling, if any;
threshold [] (batchtopk) or [s] (jumprelu); b_gate, r_mag, b_mag [s] (gated).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saebench.activations import Activation, Gated, Threshold, TopK
from saebench.errors import WeightsError
from saebench.formats.containers import parse_json
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.parts import put_together
from saebench.formats.tensors import dtype_of, float32
from saebench.inputs import Scaling
from saebench.saes import Sae

NAME = "saebench"
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
_OF_ACTIVATION = {
    "batchtopk": ("threshold",),
    "matryoshka-batchtopk": ("threshold",),
    "jumprelu": ("threshold",),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
_CONFIG = {"architecture", "d_model", "d_sae", "pre_bias", "scale"}
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka-batchtopk")


def recognise(content: Content) -> bool:
    """Whether the header says that saebench wrote it."""
    return content.metadata.get("format") == NAME


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (another version, keys or tensors that do not belong), SpecError."""
    readers = {"1": _read_1, "2": _read_2}
    version = content.metadata.get("version", "")
    if version not in readers:
        raise WeightsError(
            f"it is version {version} of the format, and this saebench reads 1 and 2",
            "pip install --upgrade saebench-vision",
        )
    sae = readers[version](content)
    _say(sae, facts)
    facts.settle()
    return sae


def _say(sae: Sae, facts: Facts) -> None:
    """What the file says, as far as it is said in words that all formats share."""
    facts.known("architecture", sae.architecture)
    facts.known("pre_bias", sae.b_pre_d is not None)
    scaled = sae.scaling.tensors or sae.scaling.scale != 1
    facts.known("input", "(x − mean)·scale" if scaled else "raw")
    if sae.scaling.rows is not None:
        facts.known("row_norm", type(sae.scaling.rows).__name__)
    if sae.k is not None:
        facts.known("k", sae.k)
    theta = sae.activation.tensors.get("threshold")
    if theta is not None:
        facts.known("threshold", theta if theta.ndim else float(theta))


def _read_1(content: Content) -> Sae:
    config = _config(content)
    architecture = config["architecture"]
    tensors: dict[str, Tensor] = content.tensors
    needed = {*_WEIGHTS, *_OF_ACTIVATION.get(architecture, ())}
    if missing := needed - set(tensors):
        raise WeightsError(f"{architecture} needs the tensors {', '.join(sorted(missing))}")
    if strange := set(tensors) - needed - {"mean"}:
        raise WeightsError(f"{architecture} has no tensors {', '.join(sorted(strange))}")
    floats = {name: float32(tensor, name) for name, tensor in tensors.items()}
    sae = Sae(
        W_enc_ds=floats["W_enc"],
        b_enc_s=floats["b_enc"],
        W_dec_sd=floats["W_dec"],
        b_dec_d=floats["b_dec"],
        activation=_activation(architecture, config, floats),
        architecture=architecture,
        b_pre_d=floats["b_dec"] if config["pre_bias"] else None,
        scaling=Scaling(floats.get("mean"), float(config["scale"])),
        prefixes=tuple(config.get("prefixes", ())),
        stored_dtype=dtype_of(tensors["W_enc"]),
    )
    if (sae.d_model, sae.d_sae) != (config["d_model"], config["d_sae"]):
        raise WeightsError(
            f"the header says {config['d_model']} x {config['d_sae']}, and the tensors are "
            f"{sae.d_model} x {sae.d_sae}"
        )
    return sae


def _read_2(content: Content) -> Sae:
    shown = parse_json(content.metadata.get("config", ""), "its config").get("sae", {})
    floats = {name: float32(tensor, name) for name, tensor in content.tensors.items()}
    dtypes = {dtype_of(tensor) for tensor in content.tensors.values()}
    return put_together(shown, floats, min(dtypes, default=""))


def _config(content: Content) -> dict[str, Any]:
    config = parse_json(content.metadata.get("config", ""), "the config of its header")
    architecture = config.get("architecture")
    if architecture not in ARCHITECTURES:
        raise WeightsError(
            f"the architecture '{architecture}' is not known", f"known: {', '.join(ARCHITECTURES)}"
        )
    valid = {*_CONFIG, "extra"}
    valid |= {"k", "signed"} if architecture == "topk" else set()
    valid |= {"prefixes"} if architecture == "matryoshka-batchtopk" else set()
    if wrong := (set(config) - valid) | (valid - {"extra"} - set(config)):
        raise WeightsError(
            f"its config lacks, or has no place for: {', '.join(sorted(wrong))}",
            f"the keys of a {architecture} are: {', '.join(sorted(valid))}",
        )
    return config


def _activation(
    architecture: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Activation:
    if architecture == "topk":
        return TopK(int(config["k"]), bool(config["signed"]))
    if architecture == "gated":
        return Gated(tensors["b_gate"], tensors["r_mag"], tensors["b_mag"])
    return Threshold(tensors["threshold"]) if architecture != "relu" else Threshold()
