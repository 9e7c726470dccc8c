"""Moves frozen dataclasses of tensors to a device: whatever tensors they hold, however deep."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def moved(thing: T, device: torch.device | str) -> T:
    """The same dataclass with all its tensors on `device`; one that it holds twice stays one."""
    return _moved(thing, device, {})


def _moved(value: Any, device: torch.device | str, there: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in there:
            there[id(value)] = value.to(device)
        return there[id(value)]
    if isinstance(value, tuple):
        return tuple(_moved(item, device, there) for item in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    held = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{name: _moved(one, device, there) for name, one in held.items()})
