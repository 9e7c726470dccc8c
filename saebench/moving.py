"""Moves frozen dataclasses of tensors to a device: whatever tensors they hold, however deep."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def moved(thing: T, device: torch.device | str) -> T:
    """The same dataclass with all its tensors on `device`."""
    changes = {f.name: _moved(getattr(thing, f.name), device) for f in fields(thing)}  # type: ignore[arg-type]
    return replace(thing, **changes)  # type: ignore[type-var]


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return moved(value, device) if is_dataclass(value) and not isinstance(value, type) else value
