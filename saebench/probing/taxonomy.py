"""The higher levels of a taxonomy, as far as a class decides them: species, genus, family.

    level -> [c] int64, the value of each class

A level is decided by the classes where each class has one value of it, on train and test images
alike. Of these, a taxonomy is the longest row of levels each of which is decided by the one before
and has fewer values: the colour of a species is decided too, but not by its genus, nor does it
decide that. Levels that tell classes apart one by one, or that are the same for all, are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from saebench.data import Dataset
from saebench.data.manifest import Manifest
from saebench.probing.sample import labels_of


def n_classes_of(dataset: Dataset, splits: Sequence[str], label: str) -> int:
    """c, the classes of a level ('' is the main label): those with names, or with images."""
    names = dataset.label_names.get(label, ()) if label else dataset.class_names
    values = [labels_of(dataset.manifest(split), label) for split in splits]
    return max([len(names), *(int(v.max()) + 1 for v in values if len(v))])


def taxonomy_of(dataset: Dataset, splits: Sequence[str], label: str = "") -> dict[str, np.ndarray]:
    """The levels above a label, the finest first. splits: all whose images are looked at.

    A class without images has the value that comes after all others, which no image has.
    """
    manifests = [dataset.manifest(split) for split in splits]
    c = n_classes_of(dataset, splits, label)
    labels = np.concatenate([labels_of(manifest, label) for manifest in manifests])
    decided: dict[str, np.ndarray] = {}
    for level in dict.fromkeys(level for manifest in manifests for level in manifest.levels):
        if all(level in manifest.levels for manifest in manifests):
            values = _decided(labels, _values(manifests, level), c)
            if values is not None:
                decided[level] = values
    present = np.zeros(c, dtype=bool)
    present[labels] = True
    n_values = {level: len(np.unique(values[present])) for level, values in decided.items()}
    between = {level: v for level, v in decided.items() if 1 < n_values[level] < present.sum()}
    return {level: between[level] for level in _longest(between, n_values)}


def _values(manifests: Sequence[Manifest], level: str) -> np.ndarray:
    return np.concatenate([manifest.levels[level] for manifest in manifests])


def _decided(labels: np.ndarray, values: np.ndarray, c: int = 0) -> np.ndarray | None:
    """The one value of each of c labels, or of as many as there are; None where one has several."""
    n = max(c, labels.max(initial=-1) + 1)
    of_class = np.full(n, values.max(initial=-1) + 1, dtype=np.int64)
    of_class[labels] = values
    return of_class if np.array_equal(of_class[labels], values) else None


def _longest(levels: Mapping[str, np.ndarray], n_values: Mapping[str, int]) -> list[str]:
    """The longest row of levels, each decided by the one before; of several the first listed."""
    rows: dict[str, list[str]] = {}
    for level in sorted(levels, key=lambda level: n_values[level]):  # the coarsest first
        after = [
            row
            for coarser, row in rows.items()
            if n_values[coarser] < n_values[level]
            and _decided(levels[level], levels[coarser]) is not None
        ]
        rows[level] = [level, *max(after, key=len, default=[])]
    return max((rows[level] for level in levels), key=len, default=[])
