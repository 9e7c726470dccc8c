"""The statistics file of an SAE: facts that its own file lacks, estimated from train activations.

A safetensors file with any of `threshold` [], `input_mean` [d], `input_std` [] or [d], and in its
header, under the name of each fact, what that was estimated from: backbone, dataset, split, images,
as JSON. `saebench estimate` writes it, an entry names it under [semantics]:
statistics = "mine.statistics.safetensors".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saebench.atomic import write_bytes
from saebench.errors import WeightsError
from saebench.formats.containers import META, parse_json, read_header, read_safetensors
from saebench.formats.tensors import float32
from saebench.identity import canonical_json
from saebench.tensorfile import serialised
from saebench.weights import first_bytes, is_safetensors

FORMAT = "saebench-statistics"
NAMES = {"threshold": (0,), "input_mean": (1,), "input_std": (0, 1)}  # name -> possible ranks

Origin = Mapping[str, str]  # what a fact was estimated from


def read_statistics(path: Path) -> dict[str, Tensor]:
    """The facts of a statistics file, float32. Errors: WeightsError."""
    _metadata(path)
    found = {name: float32(value, name) for name, value in read_safetensors(path).items()}
    for name, value in found.items():
        if name not in NAMES or value.ndim not in NAMES[name]:
            raise WeightsError(f"{path}: no statistic is {name} {list(value.shape)}")
        if not torch.isfinite(value).all():
            raise WeightsError(f"{path}: {name} is NaN or infinite")
    return found


def origins_of(path: Path) -> dict[str, Origin]:
    """What each fact was estimated from, as it was written. Errors: WeightsError."""
    return {
        name: parse_json(text, f"the origin of {name} in {path}")
        for name, text in _metadata(path).items()
        if name in NAMES
    }


def _metadata(path: Path) -> dict[str, str]:
    found = read_header(path).get(META, {}) if is_safetensors(first_bytes(path)) else {}
    if found.get("format") != FORMAT:
        raise WeightsError(f"{path} is no statistics file", "saebench estimate  writes one")
    return found


def write_statistics(
    path: Path, facts: Mapping[str, Tensor], origins: Mapping[str, Origin]
) -> None:
    """Write the facts, atomically: the same ones give the same bytes. Errors: WriteError."""
    tensors = {name: value.detach().cpu().float().contiguous() for name, value in facts.items()}
    said = {name: canonical_json(dict(origin)) for name, origin in origins.items()}
    write_bytes(path, serialised(tensors, {"format": FORMAT, **said}))
