"""Which train images probes are fitted on, and which of those their penalty is chosen by.

    full      the first n of the train split's order; every fifth of them is held back
    few-shot  of each class `shots` images to fit on, and min(shots, 4) more, held back

Few-shot (CoOp's protocol, arXiv 2109.01134): the images of a class stand in the order of the whole
split, and seed i begins at the 2·shots·i-th of them, round and round, so that the first seeds share
none where a class has enough. No image is taken twice: a class with too few gives what it has,
those to fit on first. Nothing of the test split is looked at.

What is held back joins the last fit of the full sample, once the penalty is chosen, and not that of
a few-shot one, which would not be of so many shots then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from saebench.data.manifest import Manifest
from saebench.errors import UsageError
from saebench.identity import content_hash

EVERY = 5  # of so many images of a full sample, the last is held back
MOST_HELD = 4  # images of a class that are held back from a few-shot sample


@dataclass(frozen=True, eq=False)
class Sample:
    """n images in the order they are seen. rows: of the train manifest, with their ids.

    labels: [n] int64 of the level that is predicted. held: [n] bool, those to choose a penalty by.
    refit: whether they join the last fit. shots: None for a full sample.
    """

    rows: np.ndarray
    ids: tuple[str, ...]
    labels: np.ndarray
    held: np.ndarray
    refit: bool
    shots: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def key(self) -> Mapping[str, Any]:
        """What of it can change a fit, in few words."""
        return {
            "images": content_hash(self.ids),
            "labels": content_hash(self.labels.tolist()),
            "held": content_hash(np.flatnonzero(self.held).tolist()),
            "refit": self.refit,
        }


def sample_of(
    manifest: Manifest, *, n: int, shots: int | None = None, label: str = "", seed: int = 0
) -> Sample:
    """The sample of a train manifest. n: images of a full one. label: a level; '': the main one.

    A full sample does not depend on the seed, nor a few-shot one on n.
    Errors: UsageError for a level that the manifest does not have, or fewer than one shot.
    """
    labels = labels_of(manifest, label)
    order = manifest.order()
    if shots is None:
        rows = order[:n]
        held = np.arange(len(rows)) % EVERY == EVERY - 1
    else:
        if shots < 1:
            raise UsageError(f"{shots} shots fit nothing", "give 1 or more, or  full")
        places, held = _few(labels[order], shots, seed)
        rows = order[places]
    ids = tuple(manifest.ids[row] for row in rows)
    return Sample(rows, ids, labels[rows], held, shots is None, shots)


def labels_of(manifest: Manifest, label: str) -> np.ndarray:
    """[rows] int64 of a label level; '' is the main label. Errors: UsageError naming the levels."""
    if not label:
        return manifest.labels
    if label not in manifest.levels:
        raise UsageError(
            f"the dataset '{manifest.dataset}' has no label level '{label}'",
            f"its levels: {', '.join(manifest.levels)}" if manifest.levels else "it has none",
        )
    return manifest.levels[label]


def _few(labels: np.ndarray, shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in an order of labels, ascending, and which of them are held back."""
    by_class = np.argsort(labels, kind="stable")
    _, counts = np.unique(labels, return_counts=True)
    fit: list[np.ndarray] = []
    held: list[np.ndarray] = []
    for own in np.split(by_class, np.cumsum(counts)[:-1]):
        begin = seed * 2 * shots % max(len(own), 1)
        turned = np.roll(own, -begin)[: shots + min(shots, MOST_HELD)]
        fit.append(turned[:shots])
        held.append(turned[shots:])
    places = np.concatenate(fit + held)
    is_held = np.arange(len(places)) >= sum(map(len, fit))
    ascending = np.argsort(places)
    return places[ascending], is_held[ascending]
