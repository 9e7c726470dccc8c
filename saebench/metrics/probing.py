"""What probes say of each test image, kept image by image, and what follows from it.

Of the logits L of a probe over c classes and an image's label y:

    loss  = −log softmax(L)_y, in nat
    rank  = #{k : L_k > L_y, or L_k = L_y and k < y}: of equal logits the lowest class comes first
    and of a level above the classes: P_v = Σ_{k of v} softmax(L)_k, its own loss and rank

    accuracy = mean (rank < 1) · top5 = mean (rank < 5) · loss = mean loss
    macro    = mean, over the classes that have images, of their own mean (rank < 1)

A replicate weights the images (`bootstrap`), and its macro is over the classes that have weight. A
difference is taken image by image: where two probes say the same it is exactly 0. Since all that is
kept is an image's own, nothing depends on how the images came in batches.
b images of a batch, n of all, c classes, v values of a level, q terms, R replicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saebench.metrics.bootstrap import REPLICATES, weights_of
from saebench.metrics.substitution import TOP_K, rank
from saebench.metrics.sums import ratio

BLOCK = 1024  # images whose weights are made at once
TINY = 1e-290  # below it a sum of probabilities has lost digits

What = Literal["accuracy", "top5", "macro", "loss"]


@dataclass(frozen=True, eq=False)
class Said:
    """What a probe says of b images: rank_b of the label, and loss_b; None where there is none."""

    rank_b: Tensor
    loss_b: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Level:
    """Which of v values of a higher level each of c classes has. order_c: the classes by value."""

    value_c: Tensor
    order_c: Tensor
    starts_v1: Tensor

    @classmethod
    def of(cls, value_c: np.ndarray, device: torch.device | str = "cpu") -> Level:
        """Any whole numbers, one a class; ties go to the lowest."""
        values, place_c = np.unique(value_c, return_inverse=True)
        order_c = np.argsort(place_c, kind="stable")
        starts_v1 = np.searchsorted(place_c[order_c], np.arange(len(values) + 1))
        parts = (torch.as_tensor(part, device=device) for part in (place_c, order_c, starts_v1))
        return cls(*parts)

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


def said(
    logits_bc: Tensor, labels_b: Tensor, levels: Mapping[str, Level], *, scores: bool = False
) -> dict[str, Said]:
    """What is said of the classes, under '', and of each level. scores: no log-odds, no loss."""
    if scores:
        return {"": Said(rank(logits_bc, labels_b))}
    log_p_bc = logits_bc.double().log_softmax(dim=1)
    found = {"": Said(rank(logits_bc, labels_b), _loss(log_p_bc, labels_b))}
    for name, level in levels.items():
        log_p_bv, values_b = level.log_sums(log_p_bc), level.value_c[labels_b]
        found[name] = Said(rank(log_p_bv, values_b), _loss(log_p_bv, values_b))
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
            arrays[f"rank/{name}"] = one.rank_b.int().cpu().numpy()
            if one.loss_b is not None:
                arrays[f"loss/{name}"] = one.loss_b.cpu().numpy()
        self.merge(arrays)

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        for name, array in state.items():
            self._arrays.setdefault(name, []).append(array)

    def state(self) -> dict[str, np.ndarray]:
        self._arrays = {name: [np.concatenate(some)] for name, some in self._arrays.items()}
        return {name: array for name, (array,) in self._arrays.items()}


@dataclass(frozen=True)
class Score:
    """A mean over images of one slot, or how much more it is than that of another slot."""

    what: What
    slot: str
    than: str = ""


@dataclass(frozen=True, eq=False)
class Value:
    """Of all images, and [R] of the replicates: NaN where none of the images has weight."""

    value: float
    replicates: np.ndarray


def evaluate(
    state: Mapping[str, np.ndarray], scores: Sequence[Score], replicates: int = REPLICATES
) -> dict[Score, Value]:
    """Values of at least one image. state: of `Predictions`."""
    means = [score for score in scores if score.what != "macro"]
    slots = {slot: None for s in scores if s.what == "macro" for slot in (s.slot, s.than) if slot}
    n = len(state["labels"])
    order_n = np.argsort(state["labels"], kind="stable")
    sums_rq = np.zeros((replicates, len(means)))
    total_r, present_r = np.zeros(replicates), np.zeros(replicates)
    macro_qr = np.zeros((len(slots), replicates))
    for group in _groups(state["labels"][order_n]):
        hits_qgr = np.zeros((len(slots) + 1, len(group.starts), replicates))
        for part in group.parts():
            at_m, class_m = order_n[part], group.class_m(part)
            weights_mr = weights_of(state["keys"][at_m], replicates)
            total_r += weights_mr.sum(axis=0)
            sums_rq += weights_mr.T @ _terms(state, means, at_m)
            if slots:
                right_qm = np.stack([state[f"rank/{slot}"][at_m] < 1 for slot in slots])
                hits_qgr += _added(right_qm, class_m, len(group.starts), weights_mr)
        present_gr = hits_qgr[-1] > 0
        present_r += present_gr.sum(axis=0)
        shares_qgr = hits_qgr[:-1] / np.where(present_gr, hits_qgr[-1], 1)
        macro_qr += shares_qgr.sum(axis=1)
    found = {
        score: Value(_total(state, score) / n, ratio(sums_r, total_r))
        for score, sums_r in zip(means, sums_rq.T, strict=True)
    }
    by_slot = {
        slot: Value(_macro(state, slot), ratio(macro_r, present_r))
        for slot, macro_r in zip(slots, macro_qr, strict=True)
    }
    return {s: found[s] if s in found else _difference(by_slot, s) for s in scores}


def n_present(state: Mapping[str, np.ndarray]) -> int:
    """How many classes have images."""
    return len(np.unique(state["labels"]))


def single_gain(
    state: Mapping[str, np.ndarray], sums: Mapping[str, np.ndarray], n_classes: int
) -> tuple[Value, int]:
    """Mean over classes of 1 − CE / CE of the prevalence; and over how many.

    sums: `latent` and `prevalence` [c], `latent_r` and `prevalence_r` [c R], each CE added over the
    images. Left out are classes without images, and of a replicate those without weight.
    """
    weights_cr = _class_weights(state, n_classes, sums["latent_r"].shape[1])
    present_c = np.bincount(state["labels"], minlength=n_classes) > 0
    value = _mean_gain(sums["latent"], sums["prevalence"], present_c)
    values_r = _mean_gain(sums["latent_r"], sums["prevalence_r"], weights_cr > 0)
    return Value(float(value), values_r), int(present_c.sum())


def _mean_gain(ce_c: np.ndarray, known_c: np.ndarray, used_c: np.ndarray) -> np.ndarray:
    """[c …] -> […]: of prevalences between 0 and 1, so that the CE of one is positive."""
    share_c = np.divide(ce_c, known_c, out=np.ones_like(ce_c), where=used_c)
    return ratio((1 - share_c).sum(axis=0), used_c.sum(axis=0))


def _class_weights(state: Mapping[str, np.ndarray], n_classes: int, replicates: int) -> np.ndarray:
    """[c R] float64: the weight that each replicate has of each class."""
    found_cr = np.zeros((n_classes, replicates))
    labels_n, keys_n = state["labels"], state["keys"]
    order_n = np.argsort(labels_n, kind="stable")
    for start in range(0, len(order_n), BLOCK):
        at_m = order_n[start : start + BLOCK]
        classes, first = np.unique(labels_n[at_m], return_index=True)
        found_cr[classes] += np.add.reduceat(weights_of(keys_n[at_m], replicates), first, axis=0)
    return found_cr


def _terms(
    state: Mapping[str, np.ndarray], scores: Sequence[Score], at_m: np.ndarray
) -> np.ndarray:
    """[m q] float64: what each image adds to each score."""
    columns = [_term(state, s.what, s.slot, at_m) for s in scores]
    less = [_term(state, s.what, s.than, at_m) if s.than else 0 for s in scores]
    terms = [one - other for one, other in zip(columns, less, strict=True)]
    return np.stack(terms, axis=1) if terms else np.zeros((len(at_m), 0))


def _term(state: Mapping[str, np.ndarray], what: What, slot: str, at_m: np.ndarray) -> np.ndarray:
    if what == "loss":
        return state[f"loss/{slot}"][at_m]
    return (state[f"rank/{slot}"][at_m] < (TOP_K if what == "top5" else 1)).astype(np.float64)


def _total(state: Mapping[str, np.ndarray], score: Score) -> float:
    return float(_terms(state, [score], np.arange(len(state["labels"]))).sum())


def _macro(state: Mapping[str, np.ndarray], slot: str) -> float:
    _, class_n, count_g = np.unique(state["labels"], return_inverse=True, return_counts=True)
    right_g = np.bincount(class_n, weights=state[f"rank/{slot}"] < 1)
    return float((right_g / count_g).mean())


def _difference(by_slot: Mapping[str, Value], score: Score) -> Value:
    one = by_slot[score.slot]
    if not score.than:
        return one
    other = by_slot[score.than]
    return Value(one.value - other.value, one.replicates - other.replicates)


@dataclass(frozen=True, eq=False)
class _Group:
    """Successive classes, of the images sorted by class: where each starts, and where all end."""

    starts: np.ndarray
    stop: int

    def parts(self) -> Iterator[slice]:
        """The images, so many at once that their weights fit."""
        for low in range(int(self.starts[0]), self.stop, BLOCK):
            yield slice(low, min(low + BLOCK, self.stop))

    def class_m(self, part: slice) -> np.ndarray:
        """Number, within the group, of each image's class."""
        return np.searchsorted(self.starts, np.arange(part.start, part.stop), side="right") - 1


def _groups(sorted_n: np.ndarray) -> Iterator[_Group]:
    """Classes of BLOCK images together, or one class of more."""
    starts = np.unique(sorted_n, return_index=True)[1]
    bounds = [*starts, len(sorted_n)]
    first = 0
    while first < len(starts):
        within = int(np.searchsorted(bounds, bounds[first] + BLOCK, side="right")) - 1
        stop = max(first + 1, within)
        yield _Group(starts[first:stop], int(bounds[stop]))
        first = stop


def _added(
    right_qm: np.ndarray, class_m: np.ndarray, n_classes: int, weights_mr: np.ndarray
) -> np.ndarray:
    """[q + 1 g R]: weights added over the images of each class that are right, and over all."""
    all_qm = np.concatenate([right_qm, np.ones((1, len(class_m)), dtype=bool)])
    row_k, image_k = np.nonzero(all_qm)  # by row, and so by class within each
    starts = np.searchsorted(
        row_k * n_classes + class_m[image_k], np.arange(len(all_qm) * n_classes + 1)
    )
    added = embedding_bag(
        torch.from_numpy(image_k),
        torch.from_numpy(weights_mr),
        torch.from_numpy(starts),
        mode="sum",
        include_last_offset=True,
    )
    return added.numpy().reshape(len(all_qm), n_classes, -1)
