"""What probes say of each test image, kept image by image.

Of the logits L of a probe over c classes and an image's label y:

    loss  = −log softmax(L)_y, in nat
    rank  = #{k : L_k > L_y, or L_k = L_y and k < y}: of equal logits the lowest class comes first
    and of a level above the classes: P_v = Σ_{k of v} softmax(L)_k, its own loss and rank

`probe_scores` makes means and replicates of it. Since all that is kept is an image's own, nothing
depends on how the images came in batches.
b images of a batch, c classes, v values of a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saebench.metrics.substitution import rank

FAR = 255  # no score tells ranks from here on apart
TINY = 1e-290  # below it a sum of probabilities has lost digits


@dataclass(frozen=True, eq=False)
class Said:
    """What a probe says of b images: rank_b of the label, and loss_b; None where there is none."""

    rank_b: Tensor
    loss_b: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Level:
    """Which of v values of a higher level each of c classes has.

    below: the level whose values are these classes; '' where it is the classes themselves.
    order_c: the classes by value; starts_v1: where each value begins there.
    """

    value_c: Tensor
    order_c: Tensor
    starts_v1: Tensor
    below: str = ""

    @classmethod
    def of(cls, value_c: np.ndarray, device: torch.device | str = "cpu", below: str = "") -> Level:
        """Any whole numbers, one a class; of equal probabilities the lowest comes first."""
        values, place_c = np.unique(value_c, return_inverse=True)
        order_c = np.argsort(place_c, kind="stable")
        starts_v1 = np.searchsorted(place_c[order_c], np.arange(len(values) + 1))
        parts = [torch.as_tensor(part, device=device) for part in (place_c, order_c, starts_v1)]
        return cls(parts[0], parts[1], parts[2], below)

    def log_sums(self, log_p_bc: Tensor) -> Tensor:
        """[b v] float64: log of the probabilities added up over the classes of each value."""
        log_p_cb = log_p_bc.T[self.order_c].contiguous()
        p_vb = self._reduced(log_p_cb.exp(), "sum")
        if bool((p_vb > TINY).all()):
            return p_vb.log().T
        largest_vb = self._reduced(log_p_cb, "max")
        own_cb = largest_vb.repeat_interleave(self.starts_v1.diff(), dim=0)
        return (largest_vb + self._reduced((log_p_cb - own_cb).exp(), "sum").log()).T

    def _reduced(self, x_cb: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(x_cb, how, offsets=self.starts_v1, axis=0)


def levels_of(
    taxonomy: Mapping[str, np.ndarray], device: torch.device | str = "cpu"
) -> dict[str, Level]:
    """Level -> its classes' values [c], made ready: one that another decides is added up of that.

    So the classes are gone through once, and after that the fewer values of the level before.
    """
    found: dict[str, Level] = {}
    below = ""
    for name, value_c in taxonomy.items():
        first, own_c = _distinct(taxonomy[below]) if below else (slice(None), slice(None))
        if not np.array_equal(value_c[first][own_c], value_c):
            below, first = "", slice(None)
        found[name] = Level.of(value_c[first], device, below)
        below = name
    return found


def _distinct(value_c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, first_v, own_c = np.unique(value_c, return_index=True, return_inverse=True)
    return first_v, own_c


def said(
    logits_bc: Tensor, labels_b: Tensor, levels: Mapping[str, Level], *, scores: bool = False
) -> dict[str, Said]:
    """What is said of the classes, under '', and of each level. scores: no log-odds, no loss."""
    if scores:
        return {"": Said(rank(logits_bc, labels_b))}
    log_p, own = {"": logits_bc.double().log_softmax(dim=1)}, {"": labels_b}
    found = {"": Said(rank(logits_bc, labels_b), _loss(log_p[""], labels_b))}
    for name, level in levels.items():
        log_p[name] = level.log_sums(log_p[level.below])
        own[name] = level.value_c[own[level.below]]
        found[name] = Said(rank(log_p[name], own[name]), _loss(log_p[name], own[name]))
    return found


def said_class(class_b: Tensor, labels_b: Tensor) -> Said:
    """Of a classifier that names one class: rank 0 where it is the label, else 1."""
    return Said((class_b != labels_b).int())


def _loss(log_p_bc: Tensor, labels_b: Tensor) -> Tensor:
    # + 0.0: a probability of 1 has loss 0, not −0.
    return -log_p_bc.gather(1, labels_b[:, None]).squeeze(1) + 0.0


class Predictions:
    """A `Part`: per image, in order, the bootstrap's key, the label, and what each slot said.

    A slot is one probe's, or one probe's at one level: the same ones in every batch.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, list[np.ndarray]] = {}

    def add(self, keys_b: np.ndarray, labels_b: np.ndarray, slots: Mapping[str, Said]) -> None:
        arrays = {"keys": keys_b, "labels": labels_b.astype(np.int64)}
        for name, one in slots.items():
            arrays[f"rank/{name}"] = one.rank_b.clamp(max=FAR).byte().cpu().numpy()
            if one.loss_b is not None:
                arrays[f"loss/{name}"] = one.loss_b.cpu().numpy()
        self.merge(arrays)

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        for name, array in state.items():
            self._arrays.setdefault(name, []).append(array)

    def state(self) -> dict[str, np.ndarray]:
        self._arrays = {name: [np.concatenate(some)] for name, some in self._arrays.items()}
        return {name: array for name, (array,) in self._arrays.items()}
