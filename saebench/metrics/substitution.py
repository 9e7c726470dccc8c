"""What it costs downstream to put something else in the place of activations.

Four passes over b images of c classes: clean, spliced (the reconstruction in place of x), zero and
mean (an ablation in its place). Of the logits L of a pass, an image's label y and the clean pass:

    loss        −log softmax(L)_y                                   nat
    top1, top5  y is among the k largest logits                     ties go to the lowest class
    agreement   the largest logit is that of the clean pass         ties go to the lowest class
    kl          KL(clean ‖ pass) = Σ_c p_c (log p_c − log q_c)      nat; p clean, q the pass

All in float64 and through log_softmax, so that a probability that underflows is no NaN. Means are
over images, and a share recovered is one ratio of means:

    loss_recovered = (loss_zero − loss_spliced) / (loss_zero − loss_clean)

neither clamped nor averaged over batches. Undefined where the loss that could be recovered is
below `SMALLEST_GAP`, or below its own standard error over the bootstrap's replicates. Where the
ablation lowers the loss the share is what it is, and a note says that more of it is worse.

Of the embedding e of the clean pass and ê of another, without labels:

    cosine = mean e·ê / (‖e‖‖ê‖), vectors of norm 0 left out      nmse = Σ‖ê − e‖² / Σ‖e − ē‖²
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saebench.metrics.reconstruction import squares
from saebench.metrics.spread import Spread
from saebench.metrics.sums import ImageSums, ratio

PASSES = ("clean", "spliced", "zero", "mean")
TERMS = ("images", "loss", "top1", "top5", "agreement", "kl")
EMBEDDING_TERMS = ("images", "cosine", "n_cosine", "error2")
TOP_K = 5
SMALLEST_GAP = 1e-3  # nat
ONE_IMAGE = "one image does not say how much its loss means: there is no standard error"

Means = Mapping[str, Mapping[str, np.ndarray]]
"""Pass -> term of TERMS -> its mean over images, [] or [R]."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the clean pass says of each image."""

    logits_bc: Tensor
    log_p_bc: Tensor
    class_b: Tensor

    @classmethod
    def of(cls, logits_bc: Tensor) -> Prediction:
        return cls(logits_bc, torch.log_softmax(logits_bc.double(), dim=1), predicted(logits_bc))


def predicted(logits_bc: Tensor) -> Tensor:
    """[b] int64: the class of the largest logit, the lowest of those that share it."""
    n_classes = logits_bc.shape[1]
    classes_c = torch.arange(n_classes, device=logits_bc.device)
    is_largest_bc = logits_bc == logits_bc.amax(dim=1, keepdim=True)
    return torch.where(is_largest_bc, classes_c, n_classes).amin(dim=1)


def rank(logits_bc: Tensor, labels_b: Tensor) -> Tensor:
    """[b] int64: how many classes come before the label; of equal logits the lowest class first."""
    own_b1 = logits_bc.gather(1, labels_b[:, None])
    classes_c = torch.arange(logits_bc.shape[1], device=logits_bc.device)
    tied_before_bc = (logits_bc == own_b1) & (classes_c < labels_b[:, None])
    return ((logits_bc > own_b1) | tied_before_bc).sum(dim=1)


def image_terms(logits_bc: Tensor, labels_b: Tensor, clean: Prediction) -> Tensor:
    """[b q] float64, the `TERMS` of each image."""
    log_q_bc = torch.log_softmax(logits_bc.double(), dim=1)
    loss_b = -log_q_bc.gather(1, labels_b[:, None]).squeeze(1)
    kl_b = (clean.log_p_bc.exp() * (clean.log_p_bc - log_q_bc)).sum(dim=1)
    rank_b = rank(logits_bc, labels_b)
    agrees_b = predicted(logits_bc) == clean.class_b
    return torch.stack(
        [torch.ones_like(loss_b), loss_b, rank_b < 1, rank_b < TOP_K, agrees_b, kl_b], dim=1
    )


def paired_terms(loss_m: Tensor, hit_m: Tensor) -> Tensor:
    """[m q] float64: the `TERMS` of images that are told from each other, not from classes."""
    none_m = torch.zeros_like(loss_m, dtype=torch.float64)
    return torch.stack([none_m + 1, loss_m.double(), hit_m, none_m, none_m, none_m], dim=1)


def embedding_terms(clean_bd: Tensor, other_bd: Tensor) -> Tensor:
    """[b q] float64, the `EMBEDDING_TERMS` of each image."""
    e, other = clean_bd.double(), other_bd.double()
    e2, other2 = squares(e), squares(other)
    both = (e2 > 0) & (other2 > 0)
    length = torch.where(both, e2 * other2, 1.0).sqrt()
    cosine = torch.where(both, torch.linalg.vecdot(e, other) / length, 0.0)
    return torch.stack([torch.ones_like(e2), cosine, both, squares(other - e)], dim=1)


def means_of(sums: Mapping[str, ImageSums], group: int) -> tuple[Means, Means]:
    """Mean terms of each pass for one group: of the sample, and of its replicates."""

    def means(sums_q: np.ndarray) -> dict[str, np.ndarray]:
        return {term: ratio(sums_q[..., i], sums_q[..., 0]) for i, term in enumerate(TERMS)}

    return (
        {name: means(sums[name].totals_gq[group]) for name in sums},
        {name: means(sums[name].replicates_grq[group]) for name in sums},
    )


def loss_recovered(m: Means, ablation: str) -> np.ndarray:
    """Share of the ablation's loss that the spliced pass does not have. `ablation`: zero, mean."""
    lost = m[ablation]["loss"]
    return ratio(lost - m["spliced"]["loss"], lost - m["clean"]["loss"])


def too_small(sample: Means, replicates: Means, ablation: str) -> str:
    """Why the share recovered would mean nothing; '' where it does mean something."""
    gap = float(sample[ablation]["loss"] - sample["clean"]["loss"])
    text = f"|loss_{ablation} − loss_clean| = {abs(gap):.3g} nat"
    if abs(gap) < SMALLEST_GAP:
        return f"{text}, below {SMALLEST_GAP:g}"
    gaps_r = replicates[ablation]["loss"] - replicates["clean"]["loss"]
    gaps_r = gaps_r[np.isfinite(gaps_r)]
    error = float(gaps_r.std(ddof=1)) if gaps_r.size > 1 else 0.0
    return f"{text}, below its standard error {error:.3g}" if abs(gap) < error else ""


def lowers(sample: Means, ablation: str) -> str:
    """A caution where the ablation is better than x itself; '' where it is not."""
    better = sample[ablation]["loss"] < sample["clean"]["loss"]
    return "the ablation lowers the loss: a larger share is worse here" if better else ""


@dataclass(frozen=True)
class Formula:
    """A metric from the mean terms of some passes, beside the clean one."""

    passes: tuple[str, ...]
    of: Callable[[Means], np.ndarray]
    recovered: str = ""  # the ablation that a share is recovered of


def _term(name: str, term: str) -> Formula:
    return Formula((name,), lambda m: m[name][term])


FORMULAS: Mapping[str, Formula] = {
    **{f"loss_{name}": _term(name, "loss") for name in PASSES},
    "loss_increase": Formula(("spliced",), lambda m: m["spliced"]["loss"] - m["clean"]["loss"]),
    "loss_recovered": Formula(("spliced", "zero"), lambda m: loss_recovered(m, "zero"), "zero"),
    "loss_recovered_mean": Formula(
        ("spliced", "mean"), lambda m: loss_recovered(m, "mean"), "mean"
    ),
    **{f"accuracy_{name}": _term(name, "top1") for name in PASSES},
    **{f"accuracy_top5_{name}": _term(name, "top5") for name in PASSES},
    **{f"agreement_{name}": _term(name, "agreement") for name in PASSES[1:]},
    **{f"kl_{name}": _term(name, "kl") for name in PASSES[1:]},
}
"""Every metric of a readout."""

PAIRED = tuple(n for n in FORMULAS if not n.startswith(("accuracy_top5", "agreement", "kl")))
"""The metrics of images that are told from each other: retrieval."""


@dataclass(frozen=True, eq=False)
class Value:
    """A metric's value over n images, or None and the reason; and which passes it compares."""

    metric: str
    value: float | None
    n: int
    passes: tuple[str, ...]
    replicates: np.ndarray | None = None
    note: str = ""


def values(
    sums: Mapping[str, ImageSums],
    group: int,
    unseen: Mapping[str, str],
    *,
    same_tokens: bool,
    n_classes: int = TOP_K + 1,
    only: Sequence[str] = tuple(FORMULAS),
) -> Iterator[Value]:
    """The metrics of one group of the sums of the passes.

    unseen: pass -> why nothing can be said of it, '' where it was run. same_tokens: whether what
    is ablated is what is replaced, so that what the one cannot change the other cannot either.
    """
    n = int(sums["clean"].totals_gq[group, 0])
    clean_q = sums["clean"].totals_gq[group]
    untouched = {
        name
        for name in PASSES[1:]
        if not unseen[name] and np.array_equal(sums[name].totals_gq[group], clean_q)
    }
    unseen = _vacuous(unseen, untouched, same_tokens=same_tokens)
    sample, replicates = means_of(sums, group)
    for metric in only:
        formula = FORMULAS[metric]
        why = "" if n else "no images"
        why = why or next((unseen[name] for name in formula.passes if unseen[name]), "")
        if not why and metric.startswith("accuracy_top5") and n_classes <= TOP_K:
            why = f"there are only {n_classes} classes"
        if not why and formula.recovered:
            why = too_small(sample, replicates, formula.recovered) if n > 1 else ONE_IMAGE
        if why:
            yield Value(metric, None, n, formula.passes, note=why)
        else:
            value, values_r = formula.of(sample), formula.of(replicates)
            note = lowers(sample, formula.recovered) if formula.recovered else ""
            # + 0.0: a quotient of 0 is 0, also where what it is divided by is negative.
            yield Value(metric, float(value) + 0.0, n, formula.passes, values_r + 0.0, note)


def embedding_values(
    sums: Mapping[str, ImageSums], spread: Spread, unseen: Mapping[str, str], *, same_tokens: bool
) -> Iterator[Value]:
    """embedding_cosine_* and embedding_nmse_*, of passes other than the clean one."""
    at = {term: i for i, term in enumerate(EMBEDDING_TERMS)}
    n = spread.n
    untouched = {
        name
        for name in PASSES[1:]
        if not unseen[name] and sums[name].totals_gq[0, at["error2"]] == 0
    }
    unseen = _vacuous(unseen, untouched, same_tokens=same_tokens)
    centred = spread.centred()
    for name in PASSES[1:]:
        both = sums[name].totals_gq[0], sums[name].replicates_grq[0]
        cosine, cosines_r = (ratio(q[..., at["cosine"]], q[..., at["n_cosine"]]) for q in both)
        used, why = int(both[0][at["n_cosine"]]), unseen[name] or ("" if n else "no images")
        metric = f"embedding_cosine_{name}"
        if why or not used:
            why = why or "every embedding has norm 0, untouched or with other activations"
            yield Value(metric, None, n, (name,), note=why)
        else:
            note = f"{n - used} embeddings of norm 0 are left out" if used < n else ""
            yield Value(metric, float(cosine), used, (name,), cosines_r, note)
        nmse, nmses_r = (ratio(q[..., at["error2"]], c) for q, c in zip(both, centred, strict=True))
        metric, why = f"embedding_nmse_{name}", unseen[name] or ("" if n else "no images")
        if why or not np.isfinite(nmse):
            why = why or "the embeddings of all images are equal: there is no variance"
            yield Value(metric, None, n, (name,), note=why)
        else:
            yield Value(metric, float(nmse), n, (name,), nmses_r)


def _vacuous(
    unseen: Mapping[str, str], untouched: Collection[str], *, same_tokens: bool
) -> dict[str, str]:
    """`unseen`, and the passes that are found to say nothing.

    untouched: the passes that did not change a bit of what is read, on any image. Neither ablation
    does where the tokens reach nothing; but also where x is 0 everywhere, which a reconstruction
    need not be. So what is replaced is judged by all three passes.
    """
    ablated = not any(unseen[name] or name not in untouched for name in ("zero", "mean"))
    if not ablated or (same_tokens and "spliced" not in untouched):
        return dict(unseen)
    names = ("zero", "mean", "spliced") if same_tokens else ("zero", "mean")
    why = "vacuous: ablating these tokens changes nothing that is read, on any image"
    return {name: (old or why) if name in names else old for name, old in unseen.items()}
