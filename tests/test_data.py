"""Manifests, their order, the loader, and the two embedded datasets."""

from __future__ import annotations

import colorsys
import hashlib
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from saebench.data import Dataset, Manifest, open_dataset
from saebench.data.hashing import mix, normal, uniform
from saebench.data.loader import batches
from saebench.data.render import hsv, render
from saebench.data.shapes import scene
from saebench.data.taxonomy import COLOURS, FAMILIES, GENERA, SPECIES, TEXTURES
from saebench.errors import DataError, NotFound, SpecError, UsageError
from saebench.paths import CONTENT
from saebench.specs import DatasetSpec
from saebench.strict import read_spec


def spec_of(name: str) -> DatasetSpec:
    return read_spec(DatasetSpec, CONTENT / f"registry/datasets/{name}.toml", name)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(spec_of("digits"))


@pytest.fixture(scope="module")
def shapes() -> Dataset:
    return open_dataset(spec_of("shapes"))


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


# Manifests


def manifest(labels: list[int], names: list[str] | None = None, split: str = "test") -> Manifest:
    ids = tuple(names or [f"toy/{i:04d}" for i in range(len(labels))])
    return Manifest("toy", split, ids, np.array(labels, dtype=np.int64))


def test_order_is_a_permutation_and_limits_nest():
    rows = manifest(np.random.default_rng(0).integers(0, 7, 300).tolist())
    order = rows.order()
    assert sorted(order.tolist()) == list(range(300))
    for limit in (1, 2, 17, 299, 300, 1000):
        np.testing.assert_array_equal(rows.order(limit), order[:limit])


def test_every_prefix_is_stratified():
    sizes = [5, 40, 40, 115]
    rows = manifest(np.repeat(np.arange(4), sizes).tolist())
    seen = np.cumsum(np.eye(4)[rows.labels[rows.order()]], axis=0)
    share = np.arange(1, 201)[:, None] * np.array(sizes) / 200
    assert np.abs(seen - share).max() <= 2  # quota, up to the rounding of the other classes


def test_balanced_classes_come_once_each_round():
    rows = manifest([0, 1, 2, 3, 4] * 20)
    rounds = rows.labels[rows.order()].reshape(20, 5)
    assert (np.sort(rounds, axis=1) == np.arange(5)).all()


def test_order_and_hash_do_not_depend_on_the_listing():
    rng = np.random.default_rng(1)
    rows = manifest(rng.integers(0, 5, 200).tolist())
    shuffled = rng.permutation(200)
    other = manifest(rows.labels[shuffled].tolist(), [rows.ids[i] for i in shuffled])
    assert [other.ids[i] for i in other.order()] == [rows.ids[i] for i in rows.order()]
    assert other.sha256 == rows.sha256


def test_hash_covers_dataset_split_ids_and_labels():
    rows = manifest([0, 1, 1])
    others = [
        manifest([0, 1, 0]),
        manifest([0, 1, 1], split="val"),
        manifest([0, 1, 1], ["toy/0000", "toy/0001", "toy/x"]),
        replace(rows, dataset="other"),
    ]
    assert len({rows.sha256, *(other.sha256 for other in others)}) == 5
    text = "saebench manifest 1\ntoy\ntest\ntoy/0000\t0\ntoy/0001\t1\ntoy/0002\t1\n"
    assert rows.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_bad_manifests_are_refused():
    with pytest.raises(DataError, match="'a'"):
        manifest([0, 1, 0], ["a", "b", "a"])
    with pytest.raises(DataError, match="below 0"):
        manifest([0, -1])
    with pytest.raises(DataError, match="'size'"):
        Manifest("toy", "test", ("a", "b"), np.zeros(2, np.int64), {"size": np.zeros(3, np.int64)})
    with pytest.raises(DataError, match="float64"):
        Manifest("toy", "test", ("a",), np.zeros(1))
    with pytest.raises(UsageError, match="limit of 0"):
        manifest([0]).order(0)


# Opening


def test_unknown_source_names_the_nearest():
    with pytest.raises(NotFound, match="shapes") as error:
        open_dataset(replace(spec_of("shapes"), source="shape"))
    assert error.value.hint == 'did you mean source = "shapes"?'
    with pytest.raises(NotFound, match="digits, shapes"):
        open_dataset(replace(spec_of("shapes"), source="webdav"))


def test_unknown_options_splits_and_rows_are_refused(digits: Dataset):
    with pytest.raises(SpecError, match="no option 'size'"):
        open_dataset(replace(spec_of("digits"), options={"size": 64}))
    with pytest.raises(DataError, match="no split 'dev'"):
        digits.manifest("dev")
    with pytest.raises(DataError, match="0 to 359"):
        digits.image("test", 360)


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_datasets_are_consistent(name: str):
    data = open_dataset(spec_of(name))
    ids: Counter[str] = Counter()
    for split in data.splits:
        rows = data.manifest(split)
        assert rows.dataset == name
        assert rows is data.manifest(split)
        ids.update(rows.ids)
        assert set(rows.levels) == set(data.label_names)
        assert rows.labels.max() == len(data.class_names) - 1
        for level, values in rows.levels.items():
            assert values.max() < len(data.label_names[level])
        image = data.image(split, len(rows) - 1)
        assert (image.size, image.mode) == ((32, 32), "RGB")
    assert max(ids.values()) == 1, "the splits share images"
    copy = pickle.loads(pickle.dumps(data))
    assert copy.manifest("test").sha256 == data.manifest("test").sha256


# digits


def test_digits_are_scikit_learns(digits: Dataset):
    bunch: Any = load_digits()
    seen = []
    for split, size in {"train": 1257, "val": 180, "test": 360}.items():
        rows = digits.manifest(split)
        assert len(rows) == size
        source = [int(name.removeprefix("digits/")) for name in rows.ids]
        seen += source
        np.testing.assert_array_equal(rows.labels, bunch.target[source])
        share = np.bincount(rows.labels) / size
        assert np.abs(share - np.bincount(bunch.target) / 1797).max() < 0.005
        # Averaged over its 4x4 patches, the enlarged image is close to the scan again.
        for index in (0, size - 1):
            pixels = np.asarray(digits.image(split, index), dtype=float)[..., 0]
            small = pixels.reshape(8, 4, 8, 4).mean((1, 3))
            scan = bunch.images[source[index]] * 255 / 16
            assert np.corrcoef(small.ravel(), scan.ravel())[0, 1] > 0.98
    assert sorted(seen) == list(range(1797))
    assert digits.class_names[7] == "seven"


# shapes


def test_taxonomy_is_balanced():
    assert (
        len(SPECIES) == len({s.binomial for s in SPECIES}) == len({s.common for s in SPECIES}) == 48
    )
    assert set(Counter(s.family for s in SPECIES).values()) == {8}
    assert set(Counter(s.genus for s in SPECIES).values()) == {4}
    assert Counter(s.texture for s in SPECIES) == dict.fromkeys(TEXTURES, 12)
    assert Counter(s.colour for s in SPECIES) == dict.fromkeys(COLOURS, 6)
    for genus in GENERA:  # texture and colour are crossed: both are needed
        four = [s for s in SPECIES if s.genus == genus]
        assert len({s.texture for s in four}) == len({s.colour for s in four}) == 2
        assert len({(s.texture, s.colour) for s in four}) == 4
    assert len(FAMILIES) == 6


def test_levels_follow_the_species(shapes: Dataset):
    rows = shapes.manifest("test")
    for index in (0, 47, 500, 1023):
        species = SPECIES[rows.labels[index]]
        named = {
            level: shapes.label_names[level][values[index]] for level, values in rows.levels.items()
        }
        assert (named["family"], named["genus"]) == (species.family, species.genus)
        assert named["species"] == species.binomial
        assert shapes.class_names[rows.labels[index]] == species.common
        assert f"{named['colour']} {named['texture']} {named['shape']}" == species.common


def test_nuisances_are_uniform_and_independent_of_species(shapes: Dataset):
    rows = shapes.manifest("train")
    for level in ("x", "y", "size", "rotation", "ink", "background", "brightness", "noise"):
        values, k = rows.levels[level], len(shapes.label_names[level])
        counts = np.bincount(values, minlength=k)
        # Chi-square with k - 1 degrees of freedom: far below mean plus six deviations.
        chi = ((counts - 4096 / k) ** 2 / (4096 / k)).sum()
        assert chi < (k - 1) + 6 * np.sqrt(2 * (k - 1)), level
        table = np.zeros((48, k))
        np.add.at(table, (rows.labels, values), 1)
        expected = table.sum(1, keepdims=True) * table.sum(0) / 4096
        freedom = 47 * (k - 1)
        assert ((table - expected) ** 2 / expected).sum() < freedom + 6 * np.sqrt(2 * freedom), (
            level
        )


def test_levels_are_what_is_drawn():
    """Of one scene with one factor changed, the picture changes as the factor's name says."""
    plain = replace(scene("test", 0), background="even", noise=0.0, brightness=1.0, back_value=0.1)
    object_x = lambda pixels: np.average(np.arange(32), weights=_bright(pixels).sum(0))  # noqa: E731
    left, right = (render(replace(plain, x=x, y=0.0)) for x in (-0.3, 0.3))
    assert object_x(right) - object_x(left) == pytest.approx(0.6 * 16, abs=1)
    small, large = (
        _bright(render(replace(plain, x=0.0, y=0.0, radius=r))).sum() for r in (0.3, 0.6)
    )
    assert large / small == pytest.approx(4, rel=0.1)
    dim, bright = (render(replace(plain, brightness=b)).astype(float) for b in (0.5, 1.0))
    assert dim.mean() / bright.mean() == pytest.approx(0.5, abs=0.02)
    noisy = render(replace(plain, noise=0.05)).astype(float)
    clear = render(plain).astype(float)
    inside = (clear > 40) & (clear < 215)
    assert (noisy - clear)[inside].std() == pytest.approx(0.05 * 255, rel=0.1)


def _bright(pixels: np.ndarray) -> np.ndarray:
    return (pixels.max(axis=-1) > 80).astype(float)


def test_rotation_turns_the_object():
    still = replace(
        scene("test", 8), x=0.0, y=0.0, background="even", noise=0.0, rotation=0.0, texture="plain"
    )
    turned = replace(still, rotation=0.25)
    np.testing.assert_allclose(
        render(turned).astype(int), np.rot90(render(still), -1).astype(int), atol=1
    )


def test_hsv_is_the_standard_librarys():
    for h, s, v in np.random.default_rng(0).random((50, 3)):
        np.testing.assert_allclose(hsv(h, s, v), colorsys.hsv_to_rgb(h, s, v), atol=1e-12)


def test_hash_is_splitmix64():
    # The first outputs of the published generator for the seed 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    np.testing.assert_array_equal(mix(np.uint64(1234567), np.arange(4)), published)
    draws = mix(np.uint64(5), np.arange(200_000))
    assert uniform(draws).mean() == pytest.approx(0.5, abs=0.003)
    assert normal(draws).mean() == pytest.approx(0, abs=0.01)
    assert normal(draws).std() == pytest.approx(1, abs=0.01)


def test_shapes_are_the_same_for_ever(shapes: Dataset):
    """Recorded when revision 1 was made: where one of these changes, so must the revision."""
    assert shapes.manifest("test").sha256.startswith("66610d3dddc02a66")
    pixels = np.stack([np.asarray(shapes.image("test", i)) for i in range(48)]).astype(np.int64)
    assert int(pixels.sum()) == pytest.approx(16021367, abs=3)  # a rounding or two, elsewhere


# Loader


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_cut_at_fixed_places(digits: Dataset, workers: int):
    positions = digits.manifest("test").order(50)
    found = list(batches(digits, "test", positions, tensor, 16, workers=workers))
    assert [len(rows) for rows, _ in found] == [16, 16, 16, 2]
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in found]), positions)
    expected = torch.stack([tensor(digits.image("test", int(i))) for i in positions])
    assert torch.equal(torch.cat([images for _, images in found]), expected)


def test_loader_leaves_the_global_generator_alone(digits: Dataset):
    before = torch.random.get_rng_state()
    list(batches(digits, "test", np.arange(3), tensor, 2))
    assert torch.equal(torch.random.get_rng_state(), before)


class Broken(Dataset):
    """Row 5 cannot be decoded."""

    splits = ("test",)
    class_names = ("only",)
    label_names = {}  # noqa: RUF012

    def _build_manifest(self, split: str) -> Manifest:
        return manifest([0] * 8)

    def _decode(self, split: str, index: int) -> Image.Image:
        if index == 5:
            raise OSError("image file is truncated")
        return Image.new("RGB", (4, 4))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_undecodable_image_is_named_at_its_batch(workers: int):
    data = Broken(DatasetSpec(name="toy", source="toy"))
    loader = batches(data, "test", np.arange(8), tensor, 4, workers=workers)
    assert len(next(loader)[0]) == 4
    with pytest.raises(DataError, match=r"'toy/0005'.*truncated"):
        next(loader)


def test_entries_are_strict(tmp_path: Path):
    path = tmp_path / "odd.toml"
    path.write_text('source = "digits"\nrevison = "1"\n')
    with pytest.raises(SpecError, match="revison"):
        read_spec(DatasetSpec, path, "odd")
