"""The peers' scores of a substitution, each under its project's name (docs/conventions.md).

Most are averages over batches, so the terms of each image are kept in evaluation order, and batches
are cut at fixed positions at the end, whatever batches they were computed in: batch i of size m
holds positions m i … m i + m − 1, and one that is short weighs as much as the others. n images, m
batches.

All replace and ablate every token of a site, whatever the SAE was trained on; hugofry and patchsae
the CLS token alone. Ablation puts 0 there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saebench.metrics.sums import defined, ratio


class PerImage:
    """A `Part`: q terms of every image, and its position, in evaluation order.

    By default the loss in the clean, the spliced and the zero-ablated pass.
    """

    def __init__(self, terms: int = 3) -> None:
        self._places: list[np.ndarray] = []
        self._values: list[np.ndarray] = [np.zeros((0, terms))]

    def add(self, places: range | list[int], values_bq: Tensor) -> None:
        """Add the terms of b later images."""
        self._places.append(np.asarray(places, dtype=np.int64))
        self._values.append(values_bq.double().cpu().numpy())

    @property
    def places_n(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype=np.int64), *self._places])

    @property
    def values_nq(self) -> np.ndarray:
        return np.concatenate(self._values)

    def means(self, size: int) -> np.ndarray:
        """[m q]: the mean of each batch of `size` positions."""
        numbers_n = self.places_n // size
        _, starts_m, counts_m = np.unique(numbers_n, return_index=True, return_counts=True)
        if not len(starts_m):
            return self.values_nq
        return np.add.reduceat(self.values_nq, starts_m, axis=0) / counts_m[:, None]

    def state(self) -> dict[str, np.ndarray]:
        return {"places": self.places_n, "values": self.values_nq}

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        self._places.append(state["places"])
        self._values.append(state["values"])


def contrastive_losses(logits_bc: Tensor, labels_b: Tensor) -> Tensor:
    """[b] float64: the contrastive loss of a batch of images, each with the text of its class.

    (CE(row → own text) + CE(column → own image)) / 2; images of one class have one text, and are
    told apart all the same: what is lost by that is in all passes.
    """
    logits_bb = logits_bc.double()[:, labels_b]
    own_b = logits_bb.diagonal()
    return (torch.logsumexp(logits_bb, dim=1) + torch.logsumexp(logits_bb, dim=0)) / 2 - own_b


@dataclass(frozen=True)
class Losses:
    """The loss of each batch, [m], in the clean, the spliced and the zero-ablated pass."""

    clean_m: np.ndarray
    spliced_m: np.ndarray
    zero_m: np.ndarray

    @classmethod
    def of(cls, terms_mq: np.ndarray) -> Losses:
        """From [m 3] in that order."""
        return cls(terms_mq[:, 0], terms_mq[:, 1], terms_mq[:, 2])


def prisma(losses: Losses) -> float:
    """In percent, from the means of batches."""
    clean, spliced, zero = (x.mean() for x in (losses.clean_m, losses.spliced_m, losses.zero_m))
    return float((zero - spliced) / (zero - clean + 1e-6) * 100)


def dictionary_learning(losses: Losses) -> float:
    """Mean over batches of the share recovered."""
    gained_m, gap_m = losses.spliced_m - losses.zero_m, losses.clean_m - losses.zero_m
    return float(ratio(gained_m, gap_m).mean())


def kissane(losses: Losses) -> float:
    """Mean over batches of the share recovered; a gap below 1e-4 counts as 1."""
    gap_m = losses.zero_m - losses.clean_m
    gap_m = np.where(np.abs(gap_m) < 1e-4, 1.0, gap_m)
    return float(((losses.zero_m - losses.spliced_m) / gap_m).mean())


def hugofry(losses: Losses) -> float:
    """Mean over batches of the share lost: 0 is good."""
    return float(ratio(losses.spliced_m - losses.clean_m, losses.zero_m - losses.clean_m).mean())


def ratio_of_means(losses: Losses) -> float:
    """Our loss_recovered."""
    clean, spliced, zero = (x.mean() for x in (losses.clean_m, losses.spliced_m, losses.zero_m))
    return float(ratio(zero - spliced, zero - clean))


READS = ("default", "bare", "kl", "contrastive")
"""The default head's loss; the loss with bare names at T = 1 where there is a text tower, else that
of the default head; KL(clean ‖ pass) of the default head; the loss of `contrastive_losses`."""


@dataclass(frozen=True)
class Convention:
    """A project's score: of which losses, in batches of how many images.

    Batches of one image each weigh the same, so that there the mean of batches is over images.
    """

    of: Callable[[Losses], float]
    reads: str  # of READS
    batch: int = 1
    known: bool = True  # whether the project's batch size is

    @property
    def tokens(self) -> str:
        """What it replaces and ablates."""
        return "cls" if self.reads == "contrastive" else "all"


CONVENTIONS: Mapping[tuple[str, str], Convention] = {
    ("ce_recovered", "prisma"): Convention(prisma, "bare", 128),
    ("ce_recovered", "kissane"): Convention(kissane, "default", 8),
    ("frac_recovered", "dictionary_learning"): Convention(
        dictionary_learning, "default", 128, known=False
    ),
    ("ce_loss_score", "saebench"): Convention(ratio_of_means, "default"),
    ("ce_loss_score", "sae_lens"): Convention(ratio_of_means, "default"),
    # KL of the clean pass to itself is 0: (KL_zero − KL_sae) / KL_zero.
    ("kl_div_score", "saebench"): Convention(ratio_of_means, "kl"),
    ("score", "hugofry"): Convention(hugofry, "contrastive", 128, known=False),
    ("score", "patchsae"): Convention(hugofry, "contrastive", 128, known=False),
}
"""(metric, project) -> its formula."""


def peer_value(convention: Convention, images: PerImage) -> tuple[float | None, str]:
    """A project's score of the losses of all images, and a note."""
    terms_mq = images.means(convention.batch)
    if not len(terms_mq):
        return None, "no batch of images is whole"
    with np.errstate(all="ignore"):
        value = defined(convention.of(Losses.of(terms_mq)))
    if value is None:
        return None, "this project's formula divides by 0 here"
    unknown = f"in batches of {convention.batch}: which ones the project has is not known"
    return value + 0.0, "" if convention.known else unknown  # no −0
