"""Fabricated checkpoints of every format, each beside its forward pass written in NumPy.

One module a format, with `CASES`: files of d = 8 and s = 16 (and of s = d, where no shape tells the
orientation) in the true container, written as the project's own code writes them, with values
chosen so that the usual mistakes show. `tests/test_formats_cases.py` holds all of them to the same
things, and `tests/test_formats_fuzz.py` damages them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np
import torch

D, S, N = 8, 16, 32

Forward = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """A checkpoint: `write(folder)` gives the path of its weights, `forward(x)` float64 (z, x̂).

    `semantics` is what has to be said of it; `stated` the format, where the file alone is
    ambiguous. `transcoder`: its x̂ is no estimate of x.
    """

    name: str
    format: str
    write: Callable[[Path], Path]
    forward: Forward
    semantics: Mapping[str, Any] = field(default_factory=dict)
    stated: str | None = None
    d: int = D
    transcoder: bool = False
    atol: float = 1e-5


def cases() -> list[Case]:
    """Those of all modules of this package."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    return [case for module in modules for case in module.CASES]


def numbers(*shape: int, seed: int) -> torch.Tensor:
    """Seeded float32 normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(s: int = S, d: int = D, *, seed: int = 1, unit: bool = False) -> torch.Tensor:
    """[s d] decoder rows: of length 1, or of lengths 0.5 to 2 as a format that leaves them free."""
    found = numbers(s, d, seed=seed)
    found /= found.norm(dim=1, keepdim=True)
    return found if unit else found * torch.linspace(0.5, 2, s)[:, None]


def inputs(d: int = D, *, n: int = N, seed: int = 99) -> torch.Tensor:
    """[n d] activations with a mean that is clearly not zero."""
    return 1.5 * numbers(n, d, seed=seed) + torch.linspace(0.5, 2, d)


def as64(*tensors: torch.Tensor) -> tuple[np.ndarray, ...]:
    """float64 NumPy copies."""
    return tuple(tensor.detach().double().numpy() for tensor in tensors)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


def top(values: np.ndarray, k: int) -> np.ndarray:
    """True at the k largest of each row."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    keep = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(keep, order, True, axis=1)
    return keep


def layer_norm(x: np.ndarray, eps: float = 1e-5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(u, mean, std) of rows: the unbiased deviation, eps added to it (facts, 4.3)."""
    mean = x.mean(axis=1, keepdims=True)
    std = (x - mean).std(axis=1, ddof=1, keepdims=True)
    return (x - mean) / (std + eps), mean, std
