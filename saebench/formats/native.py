"""saebench's own format: safetensors whose header says what the numbers alone cannot.

Header metadata: format = "saebench", version = "1", config = JSON with
    architecture, d_model, d_sae, pre_bias, scale    always
    k, signed                                        topk
    prefixes                                         matryoshka-batchtopk
    extra                                            whatever the writer adds; never read as meaning
Tensors: W_enc [d s], b_enc [s], W_dec [s d], b_dec [d]; mean [d] of the input scaling, if any;
threshold [] (batchtopk) or [s] (jumprelu); b_gate, r_mag, b_mag [s] (gated).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.activations import Activation, Gated, Threshold, TopK
from saebench.atomic import write_bytes
from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.inputs import Scaling
from saebench.saes import Sae

NAME = "saebench"
VERSION = "1"
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
_OF_ACTIVATION = {
    "batchtopk": ("threshold",),
    "matryoshka-batchtopk": ("threshold",),
    "jumprelu": ("threshold",),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
_CONFIG = {"architecture", "d_model", "d_sae", "pre_bias", "scale"}
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka-batchtopk")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def recognise(content: Content) -> bool:
    """Whether the header says that saebench wrote it."""
    return content.metadata.get("format") == NAME


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (another version, keys or tensors that do not belong), SpecError."""
    facts.settle()  # the file says it all
    if (version := content.metadata.get("version")) != VERSION:
        raise WeightsError(
            f"it is version {version} of the format, and this saebench reads {VERSION}",
            "pip install --upgrade saebench-vision",
        )
    config = _config(content)
    architecture = config["architecture"]
    tensors: dict[str, Tensor] = content.tensors
    needed = {*_WEIGHTS, *_OF_ACTIVATION.get(architecture, ())}
    if missing := needed - set(tensors):
        raise WeightsError(f"{architecture} needs the tensors {', '.join(sorted(missing))}")
    if strange := set(tensors) - needed - {"mean"}:
        raise WeightsError(f"{architecture} has no tensors {', '.join(sorted(strange))}")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise WeightsError(
                f"{name} is stored as {tensor.dtype}, not as float32, 16 or bfloat16"
            )
    float32 = {name: tensor.float() for name, tensor in tensors.items()}
    sae = Sae(
        W_enc_ds=float32["W_enc"],
        b_enc_s=float32["b_enc"],
        W_dec_sd=float32["W_dec"],
        b_dec_d=float32["b_dec"],
        activation=_activation(architecture, config, float32),
        architecture=architecture,
        b_pre_d=float32["b_dec"] if config["pre_bias"] else None,
        scaling=Scaling(float32.get("mean"), float(config["scale"])),
        prefixes=tuple(config.get("prefixes", ())),
        stored_dtype=str(tensors["W_enc"].dtype).removeprefix("torch."),
    )
    if (sae.d_model, sae.d_sae) != (config["d_model"], config["d_sae"]):
        raise WeightsError(
            f"the header says {config['d_model']} x {config['d_sae']}, and the tensors are "
            f"{sae.d_model} x {sae.d_sae}"
        )
    return sae


def _config(content: Content) -> dict[str, Any]:
    try:
        config = json.loads(content.metadata["config"])
    except (KeyError, ValueError):
        raise WeightsError("its header has no readable config") from None
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


def write_sae(
    sae: Sae,
    path: Path,
    *,
    extra: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype = torch.float32,
) -> str:
    """Write an SAE, atomically; returns the sha256 of the file. The same SAE gives the same bytes.

    `extra` is plain JSON about where it comes from. Errors: WriteError; WeightsError where `dtype`
    cannot hold a weight, or the format what the SAE does.
    """
    if strange := _beyond(sae):
        raise WeightsError(
            f"saebench's own format has no place for {strange}", "keep the file that it came in"
        )
    as_dtype: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    tensors = {
        name: tensor.detach().to("cpu", as_dtype).contiguous()
        for name, tensor in sae.tensors.items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{name} does not fit into {as_dtype}", "write it as float32")
    config: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_model": sae.d_model,
        "d_sae": sae.d_sae,
        "pre_bias": sae.b_pre_d is not None,
        "scale": sae.scaling.scale,
        "extra": dict(extra or {}),
    }
    if isinstance(sae.activation, TopK):
        config |= {"k": sae.activation.k, "signed": sae.activation.signed}
    if sae.prefixes:
        config["prefixes"] = list(sae.prefixes)
    data = _serialised(tensors, {"format": NAME, "version": VERSION, "config": _canonical(config)})
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def _beyond(sae: Sae) -> str:
    """What an SAE does that a file of this version cannot say; '' for nothing."""
    activation = sae.activation
    parts = {
        "the activation": not isinstance(activation, (Threshold, TopK, Gated)),
        "an inclusive threshold": isinstance(activation, Threshold) and activation.inclusive,
        "a selection by magnitude": isinstance(activation, TopK) and activation.by_magnitude,
        "a pre-bias that is not the decoder's": sae.b_pre_d is not None
        and not torch.equal(sae.b_pre_d, sae.b_dec_d),
        "rows that are normalised one by one": sae.scaling.rows is not None,
        "an input scale for each dimension": isinstance(sae.scaling.scale, Tensor),
        "hidden layers": sae.trunk is not None,
        "a transcoder": sae.transcoder or sae.skip_dd is not None,
    }
    return next((what for what, there in parts.items() if there), "")


def _serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """safetensors bytes whose header is canonical: the library orders metadata at random."""
    from safetensors.torch import save

    data = save(dict(tensors), metadata=dict(metadata))
    length = int.from_bytes(data[:8], "little")
    header = _canonical(json.loads(data[8 : 8 + length])).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
