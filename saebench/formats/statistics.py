"""The statistics file of an SAE: facts that its own file lacks, estimated from train activations.

A safetensors file with any of `threshold` [], `input_mean` [d], `input_std` [] or [d], and in its
header what they were estimated from: backbone, dataset, split, images. `saebench estimate` writes
it, an entry names it under [semantics]:  statistics = "mine.statistics.safetensors".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saebench.atomic import write_bytes
from saebench.errors import WeightsError
from saebench.formats.containers import META, read_header, read_safetensors
from saebench.formats.tensors import float32
from saebench.weights import first_bytes, is_safetensors

FORMAT = "saebench-statistics"
NAMES = {"threshold": (0,), "input_mean": (1,), "input_std": (0, 1)}  # name -> possible ranks


def read_statistics(path: Path) -> dict[str, Tensor]:
    """The facts of a statistics file, float32. Errors: WeightsError."""
    if not is_safetensors(first_bytes(path)) or origin_of(path).get("format") != FORMAT:
        raise WeightsError(f"{path} is no statistics file", "saebench estimate  writes one")
    found = {name: float32(value, name) for name, value in read_safetensors(path).items()}
    for name, value in found.items():
        if name not in NAMES or value.ndim not in NAMES[name]:
            raise WeightsError(f"{path}: no statistic is {name} {list(value.shape)}")
        if not torch.isfinite(value).all():
            raise WeightsError(f"{path}: {name} is NaN or infinite")
    return found


def origin_of(path: Path) -> dict[str, str]:
    """What the facts were estimated from, as it was written. Errors: WeightsError."""
    return read_header(path).get(META, {})


def write_statistics(path: Path, facts: Mapping[str, Tensor], origin: Mapping[str, str]) -> None:
    """Write the facts, atomically. Errors: WriteError."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().float().contiguous() for name, value in facts.items()}
    write_bytes(path, save(tensors, metadata={"format": FORMAT, **origin}))
