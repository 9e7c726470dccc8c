"""Reads a backbone's weights: check the file, parse, convert, compare with the model, load.

Weights are data: safetensors, or a PyTorch checkpoint that needs no code. Floats become float32,
whatever they were; timm resamples a float16 checkpoint before that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from saebench.backbones.conversion import classifier_names, converted, float32
from saebench.backbones.pickles import PICKLES, read_pickle
from saebench.errors import WeightsError
from saebench.specs import BackboneSpec
from saebench.weights import file_sha256, first_bytes, is_safetensors, verified_path


@dataclass(frozen=True)
class Loaded:
    """The sha256 of the file that was loaded (None: none), and which values were resampled."""

    sha256: str | None = None
    notes: tuple[str, ...] = ()


def load_weights(module: nn.Module, spec: BackboneSpec) -> Loaded:
    """Load an entry's weights into a module, every key and shape of both.

    Nothing is loaded where the entry names no weights.
    Errors: WeightsError (absent, altered, no weights, of another model, NaN), SpecError.
    """
    path = verified_path(spec)
    if path is None:
        return Loaded()
    stored = read_tensors(path)
    check_finite(stored, path)
    fitting, notes = converted(module, spec, stored, path)
    tensors = {name: float32(tensor) for name, tensor in fitting.items()}
    fit_to(module, tensors, path)
    module.load_state_dict(tensors, strict=True)
    return Loaded(file_sha256(path), tuple(notes))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file, by name, as they are stored.

    Errors: WeightsError where it is truncated, or neither safetensors nor a checkpoint that can be
    read without running code.
    """
    head = first_bytes(path)
    if head.startswith(PICKLES) and not is_safetensors(head):
        return read_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} cannot be read as safetensors: {error}",
            f"it has {path.stat().st_size} bytes, and may be truncated: get it again",
        ) from None


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
    missing = [name for name in own if name not in tensors]
    unknown = [name for name in tensors if name not in own]
    other = [
        f"{name} (file {list(tensors[name].shape)}, model {list(tensor.shape)})"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    no_floats = [
        f"{name} ({_dtype(tensors[name])})"
        for name, tensor in own.items()
        if name in tensors and tensor.is_floating_point() and not tensors[name].is_floating_point()
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (
            ("the file lacks", missing),
            ("the model lacks", unknown),
            ("shapes differ:", other),
            ("floats in the model and not in the file:", no_floats),
        )
        if names
    ]
    if not problems:
        return
    hint = "are model and model_args those that the weights were trained with?"
    if missing and not unknown and not other and set(missing) <= set(classifier_names(module)):
        hint = "the file has no classifier: model_args.num_classes = 0 builds the model without one"
    if no_floats:
        hint = "quantised numbers are no weights without their scales: save the file as floats"
    if prefix := _surplus_prefix(missing, unknown):
        hint = f"its names begin with '{prefix}': save the file anew without that"
    raise WeightsError(f"{path} does not fit the model: {'; '.join(problems)}", hint)


def _surplus_prefix(missing: Sequence[str], unknown: Sequence[str]) -> str:
    """What a training framework put before every name, such as `model.`; '' where nothing did."""
    prefix = unknown[0].partition(".")[0] + "." if unknown else ""
    stripped = {name.removeprefix(prefix) for name in unknown if name.startswith(prefix)}
    return prefix if prefix and len(stripped) == len(unknown) and stripped & set(missing) else ""


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
