"""Weights of a file as float32: what has to be there, what may be, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from saebench.errors import WeightsError
from saebench.formats.content import refuse_unknown

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def weights(
    objects: Mapping[str, Any],
    required: Collection[str],
    optional: Collection[str] = (),
    *,
    ignored: Collection[str] = (),
    what: str,
) -> dict[str, Tensor]:
    """The named tensors as float32. `ignored` are known and decide nothing, or are read elsewhere.

    Errors: WeightsError for a name that is missing or strange, or a tensor that is no float.
    """
    if missing := set(required) - set(objects):
        raise WeightsError(
            f"{what} needs the tensors {', '.join(sorted(missing))}, which are not there",
            "the file is of another format, or was cut",
        )
    wanted = {*required, *optional}
    refuse_unknown(set(objects), wanted | set(ignored), what)
    return {name: float32(objects[name], name) for name in objects if name in wanted}


def float32(value: Any, name: str) -> Tensor:
    """A tensor in float32. Errors: WeightsError for what is none, or holds no floats."""
    if not isinstance(value, Tensor):
        raise WeightsError(f"{name} is a {type(value).__name__}, not a tensor")
    if value.dtype not in _FLOATS:
        raise WeightsError(f"{name} is stored as {dtype_of(value)}, which is no float")
    return value.detach().float()


def matrix(found: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of that name. Errors: WeightsError where it has not two dimensions."""
    if found[name].ndim != 2:
        raise WeightsError(f"{name} has shape {list(found[name].shape)}, and is no matrix")
    return found[name]


def number(value: Any, name: str) -> float:
    """A number, or a tensor of one. Errors: WeightsError."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise WeightsError(f"{name} is {value!r:.80}, not a number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise WeightsError(f"{name} is {value!r:.80}: no such number fits into a tensor")
    return value


def whole(value: Any, name: str) -> int:
    """A whole number of 1 or more, or a tensor of one. Errors: WeightsError."""
    found = number(value, name)
    if not 1 <= found < 2**63 or found != int(found):
        raise WeightsError(f"{name} is {found}, not a whole number of 1 or more")
    return int(found)


def flag(value: Any, name: str) -> bool:
    """True or false. Errors: WeightsError."""
    if not isinstance(value, bool):
        raise WeightsError(f"{name} is {value!r:.80}, not true or false")
    return value


def dtype_of(value: Any) -> str:
    """`float32` and so on."""
    return str(value.dtype).removeprefix("torch.")
