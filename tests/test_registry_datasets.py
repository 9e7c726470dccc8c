"""The built-in datasets' entries, each on a small copy in its true layout, in each of its forms."""

from __future__ import annotations

import gzip
import io
import re
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saebench.data import Access, Dataset, open_dataset
from saebench.data.dsprites import ARCHIVE
from saebench.data.imagenet import lemmas
from saebench.data.overview import overview
from saebench.errors import DataError
from saebench.paths import CONTENT
from saebench.registry import Registry
from saebench.specs import DatasetSpec
from saebench.strict import read_spec
from tests import dataset_layouts as layouts

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The caches of `datasets` below tmp_path."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    with layouts.quiet():
        yield


def entry(name: str) -> DatasetSpec:
    return Registry.load().dataset(name)


def only(name: str, form: str) -> DatasetSpec:
    """An entry with one of its forms."""
    spec = entry(name)
    return replace(spec, **{f: None for f in ("folder", "tar", "hub") if f != form})


def opened(name: str, root: Path, form: str | None = None) -> Dataset:
    return open_dataset(only(name, form) if form else entry(name), Access(root))


def pixels(data: Dataset, split: str) -> list[np.ndarray]:
    rows = np.argsort(data.manifest(split).ids)
    return [np.asarray(data.image(split, int(row))) for row in rows]


def test_every_entry_is_complete() -> None:
    registry = Registry.load()
    names = set(registry.datasets)
    assert {"imagenet-1k", "inat21", "inat21-mini", "cifar10", "cifar100"} <= names
    assert {"emnist", "dsprites", "digits", "shapes"} <= names
    for name in names:
        spec = registry.dataset(name)
        assert spec.description, name
        assert spec.revision, name
        assert spec.paper.startswith("https://") or name == "shapes", name
        for template in spec.templates if isinstance(spec.templates, tuple) else ():
            assert template.count("{}") == 1, name


def test_the_page_of_datasets_is_what_the_entries_say() -> None:
    page = (ROOT / "docs/datasets.md").read_text()
    _, _, rest = page.partition("<!-- datasets -->\n")
    found, mark, _ = rest.partition("\n<!-- /datasets -->")
    assert mark, "docs/datasets.md has no table of datasets"
    assert found == overview(CONTENT), (
        "docs/datasets.md is not what saebench.data.overview.overview(CONTENT) returns"
    )


# ImageNet


def make_imagenet(root: Path) -> Path:
    """All forms of one small ImageNet: `<root>/<form>/imagenet-1k`."""
    rows = layouts.imagenet()
    layouts.as_folders(rows, root / "folder/imagenet-1k")
    layouts.as_shards(rows, root / "tar/imagenet-1k")
    layouts.write(layouts.imagenet_files(rows), root / "hub/imagenet-1k")
    return root


def test_imagenet_is_the_same_in_every_form(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path)
    forms = {form: opened("imagenet-1k", root / form) for form in ("folder", "tar", "hub")}
    truth = layouts.imagenet()
    for split in ("train", "val"):
        ids = {picture.stem: picture.label for picture in truth[split]}
        manifests = {form: data.manifest(split) for form, data in forms.items()}
        for form, rows in manifests.items():
            assert dict(zip(rows.ids, rows.labels.tolist(), strict=True)) == ids, form
            assert rows.stratified
        assert len({rows.sha256 for rows in manifests.values()}) == 1
        orders = {tuple(rows.ids[i] for i in rows.order()) for rows in manifests.values()}
        assert len(orders) == 1
        expected = [
            np.asarray(Image.open(io.BytesIO(picture.data)).convert("RGB"))
            for picture in sorted(truth[split], key=lambda picture: picture.stem)
        ]
        for data in forms.values():
            np.testing.assert_array_equal(pixels(data, split), expected)
    for data in forms.values():
        assert len(data.class_names) == 1000
        assert data.class_names[517] == "construction crane"  # open_clip's own name for it
        assert len(data.templates) == 80
        assert "test" not in data.splits  # its labels are hidden


def test_imagenet_may_lie_beside_other_datasets_in_any_form(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path)
    for form in ("folder", "tar", "hub"):
        assert opened("imagenet-1k", root / form, form).manifest("val").sha256
        for other in {"folder", "tar"} - {form}:
            with pytest.raises(DataError, match=rf"\[{other}\]"):
                opened("imagenet-1k", root / form, other)


# iNat21

SPECIES = (
    (0, "Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris"),
    (17, "Animalia_Arthropoda_Arachnida_Araneae_Agelenidae_Agelenopsis_pennsylvanica"),
    (9999, "Plantae_Tracheophyta_Polypodiopsida_Polypodiales_Woodsiaceae_Woodsia_ilvensis"),
)


def make_inat(root: Path, train: str) -> dict[str, dict[str, int]]:
    """Folders and tar archives as they unpack; returns split -> file stem -> label."""
    truth: dict[str, dict[str, int]] = {}
    for split in (train, "val"):
        truth[split] = {}
        for place, (number, taxa) in enumerate(SPECIES):
            for i in range(2):
                stem = f"{len(split)}{place}{i}0f9d6c-6f0a-4f5e-9a41-4c0f5ee2b1fa"
                truth[split][stem] = number
                path = f"{split}/{number:05d}_{taxa}/{stem}.jpg"
                layouts.write({path: layouts.photograph(10 * place + i)}, root)
    return truth


@pytest.mark.parametrize(("name", "train"), [("inat21", "train"), ("inat21-mini", "train_mini")])
def test_inat21_is_the_same_in_folders_and_archives(name: str, train: str, tmp_path: Path) -> None:
    truth = make_inat(tmp_path / "a" / name, train)
    folders = opened(name, tmp_path / "a")
    (tmp_path / "b" / name).mkdir(parents=True)
    for split in (train, "val"):
        with tarfile.open(tmp_path / "b" / name / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / "a" / name / split, arcname=split)
    shards = opened(name, tmp_path / "b")
    for split, kept in {"train": truth[train], "val": truth["val"]}.items():
        rows = folders.manifest(split)
        assert dict(zip(rows.ids, rows.labels.tolist(), strict=True)) == kept
        assert shards.manifest(split).sha256 == rows.sha256
        np.testing.assert_array_equal(pixels(folders, split), pixels(shards, split))
        order = folders.label_names["order"]
        assert {order[v] for v in rows.levels["order"]} == {
            "Haplotaxida",
            "Araneae",
            "Polypodiales",
        }
    assert set(rows.levels) == {"kingdom", "phylum", "class", "order", "family", "genus"}


def test_mini_is_not_the_full_train_split(tmp_path: Path) -> None:
    """One folder that holds all of it serves both entries, through a link."""
    small = make_inat(tmp_path / "inat21", "train_mini")
    make_inat(tmp_path / "inat21", "train")
    layouts.write({f"inat21/train/00000_{SPECIES[0][1]}/more.jpg": layouts.photograph(1)}, tmp_path)
    (tmp_path / "inat21-mini").symlink_to("inat21")
    full, mini = opened("inat21", tmp_path), opened("inat21-mini", tmp_path)
    assert (
        len(mini.manifest("train")) == len(small["train_mini"]) == len(full.manifest("train")) - 1
    )
    assert mini.manifest("val").ids == full.manifest("val").ids


# CIFAR

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar(
    config: str, features: dict[str, object], labels: dict[str, list[int]]
) -> dict[str, bytes]:
    n = len(next(iter(labels.values())))
    files = {}
    for place, split in enumerate(("train", "test")):
        images = [
            {"bytes": layouts.photograph(100 * place + i, 32, "PNG"), "path": None}
            for i in range(n)
        ]
        files[f"{config}/{split}-00000-of-00001.parquet"] = layouts.parquet(
            {"img": images, **labels}, {"img": layouts.IMAGE, **features}
        )
    return files


@pytest.mark.parametrize("with_card", [True, False])
def test_cifar10(with_card: bool, tmp_path: Path) -> None:
    labels = [3, 0, 9, 9, 5]
    files = cifar("plain_text", {"label": layouts.class_label(CIFAR10)}, {"label": labels})
    if with_card:
        config = {"plain_text": ("train", "test")}
        files["README.md"] = layouts.card(config, {"plain_text": "plain_text"})
    layouts.write(files, tmp_path / "cifar10")
    data = opened("cifar10", tmp_path)
    rows = data.manifest("test")
    assert rows.ids[:2] == ("test/00000000", "test/00000001")
    assert rows.labels.tolist() == labels
    assert data.class_names == tuple(CIFAR10)
    assert data.text_names["default"][3] == "cat"
    assert len(data.templates) == 18
    expected = Image.open(io.BytesIO(layouts.photograph(104, 32, "PNG")))
    np.testing.assert_array_equal(np.asarray(data.image("test", 4)), np.asarray(expected))


def test_cifar100_has_its_superclasses_as_a_level(tmp_path: Path) -> None:
    fine = [name.replace(" ", "_") for name in entry("cifar100").classes]
    fine[26] = "cra"  # as the card has it
    coarse = [f"superclass_{i}" for i in range(20)]
    labels = {"fine_label": [26, 99, 0], "coarse_label": [14, 13, 4]}
    features = {
        "fine_label": layouts.class_label(fine),
        "coarse_label": layouts.class_label(coarse),
    }
    layouts.write(cifar("cifar100", features, labels), tmp_path / "cifar100")
    data = opened("cifar100", tmp_path)
    rows = data.manifest("train")
    assert [data.class_names[label] for label in rows.labels] == ["crab", "worm", "apple"]
    assert rows.levels["coarse"].tolist() == [14, 13, 4]
    assert data.label_names["coarse"][14] == "superclass_14"


# EMNIST


def idx(values: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, values.ndim])
        + struct.pack(f">{values.ndim}I", *values.shape)
        + values.tobytes()
    )


def make_emnist(root: Path) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8)
    labels = np.array([0, 9, 10, 35, 36, 46], dtype=np.uint8)
    for split in ("train", "test"):
        stem = f"gzip/emnist-balanced-{split}"
        files = {
            f"{stem}-images-idx3-ubyte.gz": gzip.compress(idx(images)),
            f"{stem}-labels-idx1-ubyte.gz": gzip.compress(idx(labels)),
        }
        layouts.write(files, root / "emnist")
    return images, labels


def test_emnist_is_what_torchvision_reads(tmp_path: Path) -> None:
    from torchvision.datasets import EMNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    make_emnist(tmp_path)
    for path in (tmp_path / "emnist/gzip").glob("*test*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    stem = str(tmp_path / "emnist/gzip/emnist-balanced-test")
    data = opened("emnist", tmp_path)
    rows = data.manifest("test")
    np.testing.assert_array_equal(rows.labels, read_label_file(f"{stem}-labels-idx1-ubyte"))
    # Transposed, as everyone who looks at them does.
    upright = read_image_file(f"{stem}-images-idx3-ubyte").numpy().transpose(0, 2, 1)
    for row in range(6):
        image = np.asarray(data.image("test", row))
        np.testing.assert_array_equal(image, np.repeat(upright[row][..., None], 3, axis=-1))
    assert list(data.class_names) == EMNIST.classes_split_dict["balanced"]
    assert rows.ids[5] == "test/000005"
    assert data.fetch() == f"{tmp_path / 'emnist'}: train 6 images, test 6 images"


def test_other_idx_files_are_read_as_the_page_says(tmp_path: Path) -> None:
    text = (ROOT / "docs/datasets.md").read_text()
    (block,) = (b for b in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if '"idx"' in b)
    (tmp_path / "fashion.toml").write_text(block)
    images = np.arange(2 * 28 * 28).reshape(2, 28, 28).astype(np.uint8)
    for stem in ("train", "t10k"):
        files = {
            f"{stem}-images-idx3-ubyte": idx(images),
            f"{stem}-labels-idx1-ubyte.gz": gzip.compress(idx(np.array([9, 0], np.uint8))),
        }
        layouts.write(files, tmp_path / "fashion")
    spec = read_spec(DatasetSpec, tmp_path / "fashion.toml", "fashion")
    data = open_dataset(spec, Access(tmp_path))
    named = [data.class_names[label] for label in data.manifest("test").labels]
    assert named == ["boot", "top"]
    np.testing.assert_array_equal(np.asarray(data.image("train", 1))[..., 0], images[1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-20], "cannot be read"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-1]), r"holds 4703 bytes, not \[6, 28"),
        (lambda data: gzip.compress(b"\0\0\x08\1" + gzip.decompress(data)[4:]), "not an IDX file"),
        (lambda data: b"<html>", "cannot be read"),
        (lambda data: gzip.compress(idx(np.zeros((5, 28, 28), np.uint8))), "5 images and 6 labels"),
    ],
)
def test_damaged_idx_files_are_named(damage, message: str, tmp_path: Path) -> None:
    make_emnist(tmp_path)
    path = next(tmp_path.rglob("*test-images*"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        opened("emnist", tmp_path).manifest("test")


@pytest.mark.parametrize("name", ["emnist", "dsprites"])
def test_what_has_to_be_downloaded_by_hand_says_from_where(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path / name)) as error:
        opened(name, tmp_path).manifest("test")
    assert "https://" in error.value.hint
    with pytest.raises(DataError) as error:
        open_dataset(entry(name)).fetch()
    assert "--data-root" in error.value.hint


def test_a_label_without_a_name_is_refused(tmp_path: Path) -> None:
    make_emnist(tmp_path)
    spec = replace(entry("emnist"), classes=entry("emnist").classes[:40])
    with pytest.raises(DataError, match="a label is 46, and there are 40 names"):
        open_dataset(spec, Access(tmp_path)).manifest("test")


# dSprites


def make_dsprites(root: Path, n: int = 60, **arrays: object) -> tuple[np.ndarray, np.ndarray]:
    """As the archive is made: a pickled dictionary in it, which must never be loaded."""
    rng = np.random.default_rng(0)
    imgs = rng.integers(0, 2, (n, 64, 64), dtype=np.uint8)
    classes = np.stack([rng.integers(0, k, n) for k in (1, 3, 6, 40, 32, 32)], axis=1)
    folder = root / "dsprites"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "metadata": np.array({"title": "dSprites"}, dtype=object),
        "imgs": imgs,
        "latents_classes": classes,
        "latents_values": classes.astype(float),
        **arrays,
    }
    np.savez_compressed(folder / ARCHIVE, **content)  # type: ignore[arg-type]
    return imgs, classes


def test_dsprites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    imgs, classes = make_dsprites(tmp_path)
    data = opened("dsprites", tmp_path)
    test, train = data.manifest("test"), data.manifest("train")
    assert (len(test), len(train)) == (6, 54)
    assert not set(test.ids) & set(train.ids)
    for split, rows in {"test": test, "train": train}.items():
        source = [int(name.removeprefix("dsprites/")) for name in rows.ids]
        np.testing.assert_array_equal(rows.labels, classes[source, 1])
        for level, column in {"shape": 1, "scale": 2, "orientation": 3, "x": 4, "y": 5}.items():
            np.testing.assert_array_equal(rows.levels[level], classes[source, column])
        for row in (0, len(rows) - 1):
            image = np.asarray(data.image(split, row))
            np.testing.assert_array_equal(
                image, np.repeat(255 * imgs[source[row]][..., None], 3, -1)
            )
    assert data.fetch().endswith("60 images, unpacked")
    names = {level: len(names) for level, names in data.label_names.items()}
    assert names == {"shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}
    assert len(list((tmp_path / "store/dsprites").iterdir())) == 1  # unpacked once


def test_names_of_dsprites_are_the_values_of_its_factors() -> None:
    """Its page: scale 6 values in [0.5, 1], orientation 40 in [0, 2π], x and y 32 in [0, 1]."""
    from saebench.data.dsprites import FACTORS

    for level, values in {
        "scale": np.linspace(0.5, 1, 6),
        "orientation": np.degrees(np.linspace(0, 2 * np.pi, 40)),
        "x": np.linspace(0, 1, 32),
        "y": np.linspace(0, 1, 32),
    }.items():
        named = [float(name.rstrip("°")) for name in FACTORS[level][1]]
        np.testing.assert_allclose(named, values, atol=0.5 if level == "orientation" else 0.005)


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    make_dsprites(tmp_path)
    path = tmp_path / "dsprites" / ARCHIVE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=ARCHIVE):
        opened("dsprites", tmp_path).manifest("test")
    make_dsprites(tmp_path, imgs=np.zeros((60, 32, 32), np.uint8))
    data = opened("dsprites", tmp_path)
    data.manifest("test")
    with pytest.raises(DataError, match=r"imgs is uint8\[60, 32, 32\]"):
        data.image("test", 0)
    _, classes = make_dsprites(tmp_path)
    make_dsprites(tmp_path, latents_classes=np.asfortranarray(classes))
    assert len(opened("dsprites", tmp_path).manifest("test")) == 6
    make_dsprites(tmp_path, latents_classes=np.array([{}] * 60, dtype=object))
    with pytest.raises(DataError, match="holds pickled objects"):
        opened("dsprites", tmp_path).manifest("test")


def test_lemmas_name_every_class_of_imagenet_but_the_two_cranes() -> None:
    """What the hub calls the classes leads to their numbers."""
    from saebench.data.classes import own_numbers
    from saebench.data.imagenet import ImageNet

    names = list(lemmas())
    names[517] = "crane2"
    np.testing.assert_array_equal(own_numbers(ImageNet(), names, "here"), np.arange(1000))
    with pytest.raises(DataError, match="is not one of the 1000 classes"):
        own_numbers(ImageNet(), [*names[1:], names[0]], "here")  # another order: 'crane2' is lost
