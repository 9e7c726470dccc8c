"""Which train images probes see: counted out by hand, and what never happens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from saebench.data import Dataset, open_dataset
from saebench.data.manifest import Manifest
from saebench.errors import UsageError
from saebench.probing.sample import Sample, sample_of
from saebench.probing.taxonomy import n_classes_of, taxonomy_of
from saebench.registry import Registry
from saebench.specs import DatasetSpec

COUNTS = (40, 12, 3, 1)  # images of each class


def manifest(
    counts: tuple[int, ...] = COUNTS, split: str = "train", **levels: list[int]
) -> Manifest:
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(0).permutation(labels)
    ids = tuple(f"{split}/{i}" for i in range(len(labels)))
    of_class = {name: np.array(values)[labels] for name, values in levels.items()}
    return Manifest("made-up", split, ids, labels, of_class)


def few(shots: int, seed: int = 0, **more: object) -> Sample:
    return sample_of(manifest(), n=10, shots=shots, seed=seed, **more)  # type: ignore[arg-type]


def test_a_full_sample_is_the_first_of_the_order() -> None:
    rows = manifest()
    sample = sample_of(rows, n=33, seed=7)
    assert sample.rows.tolist() == rows.order(33).tolist()
    assert sample.ids == tuple(rows.ids[i] for i in rows.order(33))
    assert sample.labels.tolist() == rows.labels[rows.order(33)].tolist()
    assert np.flatnonzero(sample.held).tolist() == [4, 9, 14, 19, 24, 29]
    assert (sample.refit, sample.shots, len(sample)) == (True, None, 33)
    assert len(sample_of(rows, n=10_000)) == sum(COUNTS)
    assert not sample_of(rows, n=4).held.any()


@pytest.mark.parametrize("shots", [1, 2, 5, 10])
def test_few_shots_of_each_class(shots: int) -> None:
    rows = manifest()
    sample = few(shots)
    fit = Counter(sample.labels[~sample.held].tolist())
    held = Counter(sample.labels[sample.held].tolist())
    for c, count in enumerate(COUNTS):
        assert fit[c] == min(shots, count)
        assert held[c] == min(min(shots, 4), count - fit[c])
    assert len(set(sample.rows.tolist())) == len(sample)
    place = {row: i for i, row in enumerate(rows.order().tolist())}
    places = [place[row] for row in sample.rows.tolist()]
    assert places == sorted(places)  # seen in the order of the split
    assert (sample.refit, sample.shots) == (False, shots)


def test_seeds_take_other_images_as_long_as_there_are_any() -> None:
    shots = 5  # and 4 held: classes of 40 images hold four seeds, each of 10
    own = [row for row in manifest().order() if manifest().labels[row] == 0]
    taken = []
    for seed in range(4):
        sample = few(shots, seed)
        of_class = sample.labels == 0
        taken.append(set(sample.rows[of_class].tolist()))
        fit = set(sample.rows[of_class & ~sample.held].tolist())
        assert fit == set(map(int, own[10 * seed : 10 * seed + 5]))
    assert len(set.union(*taken)) == 4 * 9
    assert set(few(shots, 4).rows[few(shots, 4).labels == 0].tolist()) == taken[0]  # round again
    keys = [str(few(shots, seed).key) for seed in range(4)]
    assert len(set(keys)) == 4


def test_a_few_shot_sample_does_not_depend_on_the_limit_nor_on_chance() -> None:
    one, other = (sample_of(manifest(), n=n, shots=2, seed=3) for n in (5, 50))
    assert one.key == other.key
    assert np.array_equal(one.rows, other.rows)


def test_of_another_level() -> None:
    rows = manifest(genus=[0, 0, 1, 1])
    sample = sample_of(rows, n=100, shots=2, label="genus")
    assert Counter(sample.labels[~sample.held].tolist()) == {0: 2, 1: 2}
    assert np.array_equal(sample.labels, rows.levels["genus"][sample.rows])
    with pytest.raises(UsageError, match=r"no label level 'family'\n.*its levels: genus"):
        sample_of(rows, n=100, label="family")
    with pytest.raises(UsageError, match="0 shots"):
        few(0)


def test_its_key_tells_samples_apart() -> None:
    rows = manifest(genus=[0, 0, 1, 1])
    same = [sample_of(rows, n=30).key, sample_of(manifest(), n=30).key]
    assert same[0] == same[1]
    others = [
        sample_of(rows, n=31),
        sample_of(rows, n=30, label="genus"),
        sample_of(rows, n=30, shots=2),
    ]
    assert len({str(key) for key in [same[0], *(other.key for other in others)]}) == 4
    assert sample_of(rows, n=30, label="genus").key["images"] == same[0]["images"]


class MadeUp(Dataset):
    """Manifests of two splits."""

    splits = ("train", "test")

    def __init__(self, names: tuple[str, ...] = (), **levels: list[int]) -> None:
        super().__init__(DatasetSpec(name="made-up", path="", source="folder"))
        self.class_names, self.label_names = names, {}
        counts = tuple(1 for _ in next(iter(levels.values())))
        for split in self.splits:
            self._manifests[split] = manifest(tuple(2 * n for n in counts), split, **levels)

    def _build_manifest(self, split: str) -> Manifest:
        raise AssertionError(split)

    def _decode(self, split: str, index: int) -> None:  # type: ignore[override]
        raise AssertionError(split)


def levels_of(dataset: Dataset, label: str = "") -> dict[str, list[int]]:
    return {name: v.tolist() for name, v in taxonomy_of(dataset, dataset.splits, label).items()}


def test_the_levels_above_a_class() -> None:
    genus, family, order = (
        [0, 0, 1, 1, 2, 2, 3, 3],
        [0, 0, 0, 0, 1, 1, 2, 2],
        [5, 5, 5, 5, 5, 5, 1, 1],
    )
    dataset = MadeUp(
        kingdom=[3] * 8,  # the same for all
        order=order,
        colour=[0, 1, 0, 1, 0, 1, 0, 1],  # of the class, and of no genus
        family=family,
        genus=genus,
        species=[7, 6, 5, 4, 3, 2, 1, 0],  # the classes under another number
    )
    found = levels_of(dataset)
    assert list(found) == ["genus", "family", "order"]
    assert list(found.values()) == [genus, family, order]
    assert levels_of(dataset, "genus") == {"family": [0, 0, 1, 2], "order": [5, 5, 5, 1]}
    assert levels_of(dataset, "order") == {}


def test_a_level_that_a_class_does_not_decide() -> None:
    dataset = MadeUp(genus=[0, 0, 1])
    values = dataset.manifest("test").levels["genus"]
    values[np.flatnonzero(dataset.manifest("test").labels == 0)[0]] = 1  # on one test image
    assert levels_of(dataset) == {}


def test_classes_without_images_have_a_value_of_their_own() -> None:
    dataset = MadeUp(tuple("abcde"), genus=[0, 0, 1])
    assert n_classes_of(dataset, dataset.splits, "") == 5
    assert levels_of(dataset) == {"genus": [0, 0, 1, 2, 2]}


def test_shapes_have_genera_and_families() -> None:
    shapes = open_dataset(Registry.load().dataset("shapes"))
    found = taxonomy_of(shapes, ("train", "test"))
    assert list(found) == ["genus", "family"]
    manifest = shapes.manifest("test")
    for level, values in found.items():
        assert np.array_equal(values[manifest.labels], manifest.levels[level])
    assert list(taxonomy_of(shapes, ("train", "test"), "genus")) == ["family"]
    assert taxonomy_of(shapes, ("train", "test"), "colour") == {}
    assert taxonomy_of(shapes, ("train", "test"), "background") == {}
