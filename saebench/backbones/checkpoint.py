"""Reads a backbone's weights: check the file, parse it, compare it with the model, load.

Weights are data: safetensors only, nothing in a file is executed. Floats become float32, whatever
they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from saebench.errors import WeightsError
from saebench.specs import BackboneSpec
from saebench.weights import file_sha256, first_bytes, verified_path


def load_weights(module: nn.Module, spec: BackboneSpec) -> str | None:
    """Load an entry's weights into a module, every key and shape of both. Returns their sha256.

    None, and nothing is loaded, where the entry names no weights.
    Errors: WeightsError (absent, altered, not safetensors, of another model, NaN), SpecError.
    """
    path = verified_path(spec)
    if path is None:
        return None
    refuse_pickles(path)
    tensors = read_tensors(path)
    check_finite(tensors, path)
    fit_to(module, tensors, path)
    module.load_state_dict(tensors, strict=True)
    return file_sha256(path)


def refuse_pickles(path: Path) -> None:
    """Errors: WeightsError for a PyTorch pickle."""
    if first_bytes(path).startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        raise WeightsError(
            f"{path} is a PyTorch pickle, and reading one can run code",
            "convert it to safetensors in a place you trust: safetensors.torch.save_file("
            "torch.load(path, weights_only=True), ...)",
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, floats as float32.

    Errors: WeightsError where the file is truncated or is not safetensors.
    """
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_tensor(name)
                tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} cannot be read as safetensors: {error}",
            f"it has {path.stat().st_size} bytes, and may be truncated: get it again",
        ) from None
    return tensors


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Errors: WeightsError naming the tensors that hold NaN or infinite values."""
    bad = [
        f"{name} ({int((~torch.isfinite(tensor)).sum())} of {tensor.numel()})"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if bad:
        raise WeightsError(
            f"{path} holds NaN or infinite values: {_some(bad)}",
            "the file is damaged, or its training diverged: use another",
        )


def fit_to(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Errors: WeightsError naming the tensors in which the file and the model differ."""
    own = module.state_dict()
    problems = []
    if missing := [name for name in own if name not in tensors]:
        problems.append(f"the file lacks {_some(missing)}")
    if unknown := [name for name in tensors if name not in own]:
        problems.append(f"the model lacks {_some(unknown)}")
    if other := [
        f"{name} (file {list(tensors[name].shape)}, model {list(tensor.shape)})"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]:
        problems.append(f"shapes differ: {_some(other)}")
    if problems:
        raise WeightsError(
            f"{path} does not fit the model: {'; '.join(problems)}",
            "are model and model_args those that the weights were trained with?",
        )


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
