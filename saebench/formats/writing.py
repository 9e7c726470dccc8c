"""Writes saebench's own format (`saebench.formats.native` reads it)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.activations import Gated, Threshold, TopK
from saebench.atomic import write_bytes
from saebench.errors import WeightsError
from saebench.formats.native import ARCHITECTURES, NAME
from saebench.formats.parts import taken_apart
from saebench.identity import canonical_json
from saebench.saes import Sae
from saebench.tensorfile import serialised


def write_sae(
    sae: Sae,
    path: Path | str,
    *,
    extra: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype = torch.float32,
) -> str:
    """Write an SAE, atomically; returns the sha256 of the file. The same SAE gives the same bytes.

    `extra` is plain JSON about where it comes from. Errors: WriteError; WeightsError where `dtype`
    cannot hold a weight, or the format what the SAE does.
    """
    as_dtype: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    version, config, weights = _said(sae)
    tensors = {
        name: tensor.detach().to("cpu", as_dtype).contiguous() for name, tensor in weights.items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{name} does not fit into {as_dtype}", "write it as float32")
    text = canonical_json({**config, "extra": dict(extra or {})})
    data = serialised(tensors, {"format": NAME, "version": version, "config": text})
    write_bytes(Path(path), data)
    return hashlib.sha256(data).hexdigest()


def _said(sae: Sae) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(version, config, tensors): version 1 where it suffices, so that its readers read it."""
    if _beyond_1(sae):
        shown, tensors = taken_apart(sae)
        return "2", {"sae": shown}, tensors
    config: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_model": sae.d_model,
        "d_sae": sae.d_sae,
        "pre_bias": sae.b_pre_d is not None,
        "scale": sae.scaling.scale,
    }
    if isinstance(sae.activation, TopK):
        config |= {"k": sae.activation.k, "signed": sae.activation.signed}
    if sae.prefixes:
        config["prefixes"] = list(sae.prefixes)
    return "1", config, {n: t for n, t in sae.tensors.items() if n != "b_pre"}


def _beyond_1(sae: Sae) -> bool:
    """Whether an SAE does what a file of version 1 cannot say."""
    activation, scaling = sae.activation, sae.scaling
    architecture = {TopK: "topk", Gated: "gated"}.get(type(activation))
    return (
        sae.architecture not in ARCHITECTURES
        or not isinstance(activation, (Threshold, TopK, Gated))
        or (architecture is not None and architecture != sae.architecture)
        or (isinstance(activation, Threshold) and activation.inclusive)
        or (isinstance(activation, Threshold) and not _threshold_fits(sae, activation))
        or (isinstance(activation, TopK) and activation.by_magnitude)
        or (isinstance(activation, Gated) and activation.k is not None)
        or (sae.b_pre_d is not None and not torch.equal(sae.b_pre_d, sae.b_dec_d))
        or scaling.rows is not None
        or isinstance(scaling.scale, Tensor)
        or sae.trunk is not None
        or sae.transcoder
        or sae.skip_dd is not None
        or bool(sae.prefixes) != (sae.architecture == "matryoshka-batchtopk")
    )


def _threshold_fits(sae: Sae, activation: Threshold) -> bool:
    """Whether a threshold is what version 1 takes from the architecture."""
    if sae.architecture == "relu":
        return not isinstance(activation.theta, Tensor) and activation.theta == 0
    return isinstance(activation.theta, Tensor)
