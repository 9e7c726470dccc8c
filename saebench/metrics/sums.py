"""Streaming sums in float64 that can be saved, restored and merged without losing a bit.

    Total       one sum and its count
    Sums        named arrays, added element by element
    ImageSums   per group: sums of per-image terms, and the same in every bootstrap replicate

Images are the unit of resampling, so terms of rows are first added up within an image
(`per_kind`), then over images, plainly and with each replicate's weights (`Contracted`).
b images, t tokens, q terms, g groups (token kinds), R replicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saebench.metrics.bootstrap import REPLICATES


class Total:
    """A sum and the number of terms in it."""

    def __init__(self) -> None:
        self.sum, self.n = 0.0, 0

    def add(self, value: float | Tensor, n: int) -> None:
        """Add the sum of `n` terms."""
        self.sum += float(value)
        self.n += n

    def mean(self) -> float | None:
        """None when nothing was added."""
        return self.sum / self.n if self.n else None

    def state(self) -> dict[str, np.ndarray]:
        return {"sum": np.array(self.sum), "n": np.array(self.n)}

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        self.add(float(state["sum"]), int(state["n"]))


class Sums:
    """Named float64 (or int64) arrays of fixed shapes, each a running sum."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.values = {name: np.zeros(shape) for name, shape in shapes.items()}

    def add(self, **terms: Tensor | np.ndarray) -> None:
        for name, value in terms.items():
            self.values[name] += value.cpu().numpy() if isinstance(value, Tensor) else value

    def state(self) -> dict[str, np.ndarray]:
        return dict(self.values)

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        self.add(**state)


@dataclass(frozen=True)
class Contracted:
    """Per-image terms of one batch, added over its images: totals_gq and replicates_grq."""

    totals_gq: np.ndarray
    replicates_grq: np.ndarray

    @classmethod
    def of(cls, terms_gbq: Tensor, weights_br: Tensor) -> Contracted:
        """terms [g b q] float64 of b images, with the images' bootstrap weights [b R]."""
        replicates_grq = weights_br.T @ terms_gbq
        return cls(terms_gbq.sum(dim=1).cpu().numpy(), replicates_grq.cpu().numpy())


class ImageSums:
    """Sums of q terms per group, over all images and over every bootstrap replicate of them."""

    def __init__(self, groups: int, terms: int, replicates: int = REPLICATES) -> None:
        self.totals_gq = np.zeros((groups, terms))
        self.replicates_grq = np.zeros((groups, replicates, terms))

    def add(self, batch: Contracted) -> None:
        self.totals_gq += batch.totals_gq
        self.replicates_grq += batch.replicates_grq

    def state(self) -> dict[str, np.ndarray]:
        return {"totals": self.totals_gq, "replicates": self.replicates_grq}

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        self.add(Contracted(state["totals"], state["replicates"]))


def per_kind(terms_btq: Tensor, kinds: Sequence[slice]) -> Tensor:
    """[g b q]: the terms [b t q] of each image's tokens, added up within each token kind."""
    return torch.stack([terms_btq[:, part].sum(dim=1) for part in kinds])


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN, for undefined, where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def defined(value: float | np.ndarray) -> float | None:
    """A plain float, or None where it is NaN or infinite."""
    return float(value) if np.isfinite(value) else None
