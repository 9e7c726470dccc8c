"""Means over test images of what probes said of them, and the same of every bootstrap replicate.

    accuracy = mean (rank < 1) · top5 = mean (rank < 5) · loss = mean loss
    macro    = mean, over the classes that have images, of their own mean (rank < 1)

A replicate weights the images (`bootstrap`), and its macro is over the classes that have weight. A
difference is taken image by image: where two probes say the same it is exactly 0. The weights are
made anew from the images' keys, some images at a time.
m of the n images, g classes, q terms, R replicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from saebench.metrics.bootstrap import REPLICATES, weights_of
from saebench.metrics.substitution import TOP_K
from saebench.metrics.sums import ratio

BLOCK = 1024  # images whose weights are made at once

What = Literal["accuracy", "top5", "macro", "loss"]


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
    state: Mapping[str, np.ndarray],
    ce_c: np.ndarray,
    ce_cr: np.ndarray,
    prevalence_c: np.ndarray,
) -> tuple[Value, int]:
    """Mean over classes of 1 − CE / CE of the prevalence; and over how many.

    ce: added up over the images [c], and those of each replicate [c R]. Left out are classes
    without images (of a replicate, without weight), and a prevalence of 0 or 1.
    """
    weights_cr = _class_weights(state, len(ce_c), ce_cr.shape[1])
    images_c = np.bincount(state["labels"], minlength=len(ce_c)).astype(np.float64)
    told_c = (prevalence_c > 0) & (prevalence_c < 1)
    value, n_used = _mean_gain(ce_c[:, None], images_c[:, None], told_c, prevalence_c)
    values_r, _ = _mean_gain(ce_cr, weights_cr, told_c, prevalence_c)
    return Value(float(value[0]), values_r), int(n_used[0])


def _mean_gain(
    ce_cr: np.ndarray, weight_cr: np.ndarray, told_c: np.ndarray, prevalence_c: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[R], and over how many classes."""
    p_c = np.where(told_c, prevalence_c, 0.5)
    others_cr = weight_cr.sum(axis=0) - weight_cr
    known_cr = -np.log(p_c)[:, None] * weight_cr - np.log1p(-p_c)[:, None] * others_cr
    used_cr = told_c[:, None] & (weight_cr > 0)
    share_cr = np.divide(ce_cr, known_cr, out=np.ones_like(ce_cr), where=used_cr)
    n_used_r = used_cr.sum(axis=0)
    return ratio((1 - share_cr).sum(axis=0), n_used_r), n_used_r


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
