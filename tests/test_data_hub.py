"""Datasets of the hub: from folders, and from a stand-in of the hub."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from saebench import api, lock
from saebench.data import Access, Dataset, open_dataset
from saebench.data.loader import batches
from saebench.errors import DataError
from saebench.hub import resolve_revision
from saebench.paths import CONTENT
from saebench.registry import Registry
from saebench.specs import DatasetSpec, FolderForm, HubForm, TarForm
from saebench.strict import read_spec
from tests import dataset_layouts as layouts
from tests.hub_stand_in import HubStandIn

PETS = ("Pug", "Abyssinian", "basset_hound")  # as the dataset numbers them, which is no sorting
FEATURES = {"image": layouts.IMAGE, "label": layouts.class_label(PETS)}
REPO = "someone/pets"
TEST = "data/test-00000-of-00001.parquet"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf/datasets")
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("SAEBENCH_DATA", raising=False)
    with layouts.quiet():
        yield


def pictures(n: int, first: int = 0, *, paths: bool = True) -> list[dict[str, Any]]:
    return [
        {"bytes": layouts.photograph(i, 16, "PNG"), "path": f"pet_{i:03d}.png" if paths else None}
        for i in range(first, first + n)
    ]


def pets(n_train: int = 5, n_test: int = 3, **more: Any) -> dict[str, bytes]:
    """A repository of two splits, with a card."""
    columns = {
        "train": {"image": pictures(n_train), "label": [i % 3 for i in range(n_train)]},
        "test": {"image": pictures(n_test, 500), "label": [(i + 1) % 3 for i in range(n_test)]},
    }
    return {
        "README.md": layouts.card({"default": ("train", "test")}),
        "data/train-00000-of-00001.parquet": layouts.parquet(columns["train"], FEATURES),
        TEST: layouts.parquet(columns["test"], FEATURES),
        **more,
    }


def shards(columns: Mapping[str, Sequence[Any]], features: Any = FEATURES) -> dict[str, bytes]:
    """The same rows as both splits."""
    data = layouts.parquet(columns, features)
    return {f"data/{split}-00000-of-00001.parquet": data for split in ("train", "test")}


def spec_of(repo: object = REPO, **form: Any) -> DatasetSpec:
    fields = {key: form.pop(key) for key in ("train", "test", "holdout", "classes") if key in form}
    return DatasetSpec(name="pets", source="images", hub=HubForm(repo=str(repo), **form), **fields)


def opened(files: Mapping[str, bytes], root: Path, **form: Any) -> Dataset:
    return open_dataset(spec_of(layouts.write(files, root / "pets-here"), **form))


# Rows


def test_rows_are_what_was_written(tmp_path: Path) -> None:
    data = opened(pets(), tmp_path)
    rows = data.manifest("test")
    assert rows.ids == ("test/pet_500", "test/pet_501", "test/pet_502")
    assert rows.labels.tolist() == [1, 2, 0]
    assert data.class_names == PETS
    assert data.text_names["default"] == ("Pug", "Abyssinian", "basset hound")
    assert data.splits == ("train", "test")
    assert rows.stratified
    assert data.resolved_revision == ""
    for row in range(3):
        expected = Image.open(io.BytesIO(layouts.photograph(500 + row, 16, "PNG")))
        np.testing.assert_array_equal(np.asarray(data.image("test", row)), np.asarray(expected))


def test_a_folder_is_found_beside_the_entry_and_below_the_data_root(tmp_path: Path) -> None:
    layouts.write(pets(), tmp_path / "content/datasets/files")
    spec = replace(spec_of("files"), path=str(tmp_path / "content/datasets/pets.toml"))
    beside = open_dataset(spec).manifest("test")
    layouts.write(pets(), tmp_path / "root/pets")
    below = open_dataset(spec_of(REPO), Access(tmp_path / "root")).manifest("test")
    assert beside.sha256 == below.sha256
    for repo in ("./nothing", "nothing", "/no/such/folder"):
        with pytest.raises(DataError, match=r"\[hub\].*no such folder"):
            open_dataset(spec_of(repo))


def test_what_images_are_called(tmp_path: Path) -> None:
    labels = [0, 1, 2]

    def ids(name: str, images: list[dict[str, Any]], **form: Any) -> tuple[str, ...]:
        more = {"number": [7, 8, 9], "row": ["x", "y", "z"]} if "id" in form else {}
        files = shards({"image": images, "label": labels, **more})
        return opened(files, tmp_path / name, **form).manifest("test").ids

    assert ids("a", pictures(3, paths=False)) == tuple(f"test/{i:08d}" for i in range(3))
    assert ids("b", pictures(3), id="number") == ("test/7", "test/8", "test/9")
    assert ids("c", pictures(3), id="row") == (
        "test/x",
        "test/y",
        "test/z",
    )  # a column of that name
    same = [{**picture, "path": "image.png"} for picture in pictures(3)]
    with pytest.raises(DataError, match="same path, as 'image\\.png'") as error:
        ids("d", same)
    assert 'id = "…"' in error.value.hint
    files = shards({"image": same, "label": labels})
    numbered = opened(files, tmp_path / "e", id="row").manifest("test").ids
    assert numbered == tuple(f"test/{i:08d}" for i in range(3))
    with pytest.raises(DataError, match="1 of 3 images have no path"):
        ids("f", [*pictures(2), {**pictures(1)[0], "path": None}])


def test_listing_touches_no_image(tmp_path: Path) -> None:
    images = [{"bytes": b"no image at all", "path": f"{i}.png"} for i in range(4)]
    data = opened(shards({"image": images, "label": [0, 1, 2, 0]}), tmp_path)
    assert len(data.manifest("train")) == 4
    with pytest.raises(DataError, match="row 2: "):
        data.image("train", 2)


# Labels


def labels_of(root: Path, label: Sequence[Any], feature: Any = None, **form: Any) -> Dataset:
    features = {"image": layouts.IMAGE, **({"label": feature} if feature else {})}
    return opened(shards({"image": pictures(len(label)), "label": label}, features), root, **form)


def test_labels_are_numbers_or_names(tmp_path: Path) -> None:
    names = labels_of(tmp_path / "a", ["pug", "basset", "pug"])
    assert names.class_names == ("basset", "pug")
    assert names.manifest("test").labels.tolist() == [1, 0, 1]
    numbers = labels_of(tmp_path / "b", [2, 0, 1])
    assert numbers.manifest("test").labels.tolist() == [2, 0, 1]
    assert numbers.class_names == ("0", "1", "2")
    assert numbers.text_names == {}
    truth = labels_of(tmp_path / "c", [True, False])
    assert truth.manifest("test").labels.tolist() == [1, 0]


def test_an_entry_may_call_the_classes_otherwise(tmp_path: Path) -> None:
    feature = layouts.class_label(["cra", "aquarium_fish"])
    renamed = labels_of(tmp_path / "a", [0, 1], feature, classes=("crab", "aquarium fish"))
    assert renamed.class_names == ("crab", "aquarium fish")
    assert renamed.manifest("test").labels.tolist() == [0, 1]
    turned = labels_of(tmp_path / "b", [0, 1], feature, classes=("aquarium_fish", "cra"))
    assert turned.manifest("test").labels.tolist() == [1, 0]  # the names say so
    with pytest.raises(DataError, match="not one of the 3 classes"):
        labels_of(tmp_path / "c", [0, 1], feature, classes=("a", "b", "c")).manifest("test")


@pytest.mark.parametrize(
    ("label", "feature", "message"),
    [
        ([-1, -1], layouts.class_label(["a", "b"]), "'label' of 2 rows is -1"),
        ([0, None], None, "1 of 2 rows have no 'label'"),
        ([0.5, 1.5], None, "'label' is double"),
        ([[0], [1]], None, "'label' is list"),
    ],
)
def test_what_is_no_label_is_refused(label, feature, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as error:
        labels_of(tmp_path, label, feature).manifest("test")
    assert error.value.hint


def test_levels_and_parts_of_columns(tmp_path: Path) -> None:
    columns = {
        "image": pictures(3),
        "label": [0, 1, 2],
        "size": ["small", "large", "small"],
        "json": [{"age": 3}, {"age": 1}, {"age": 3}],
    }
    files = shards(columns, {})
    data = opened(files, tmp_path, levels={"size": "size", "age": "json.age"})
    rows = data.manifest("test")
    assert data.label_names["size"] == ("large", "small")
    assert rows.levels["size"].tolist() == [1, 0, 1]
    assert [data.label_names["age"][v] for v in rows.levels["age"]] == ["3", "1", "3"]
    for column, message in {
        "weight": "no column 'weight'",
        "json.sex": "'json.sex' has no part 'sex'",
    }.items():
        with pytest.raises(DataError, match=message) as error:
            opened(files, tmp_path, levels={"x": column}).manifest("test")
        assert "age" in error.value.hint or "size" in error.value.hint


def test_images_are_encoded_files(tmp_path: Path) -> None:
    for place, column in enumerate(([[1, 2], [3, 4]], ["a.png", "b.png"], [{"x": 1}, {"x": 2}])):
        files = shards({"image": column, "label": [0, 1]}, {})
        with pytest.raises(DataError, match=r"'image' is .* images are encoded files") as error:
            opened(files, tmp_path / str(place)).manifest("test")
        assert 'image = "…"' in error.value.hint
    png = [picture["bytes"] for picture in pictures(2)]
    data = opened(shards({"image": png, "label": [0, 1]}, {}), tmp_path / "bytes")
    assert data.manifest("test").ids == ("test/00000000", "test/00000001")
    assert data.image("test", 1).tobytes() == Image.open(io.BytesIO(png[1])).tobytes()


# Splits


def test_splits_are_mapped_and_others_left_alone(tmp_path: Path) -> None:
    hidden = layouts.parquet({"image": pictures(2, 900), "label": [-1, -1]}, FEATURES)
    files = pets()
    files["data/validation-00000-of-00001.parquet"] = files[TEST]
    files[TEST] = hidden
    files["README.md"] = layouts.card({"default": ("train", "validation", "test")})
    data = opened(files, tmp_path, test="val", splits={"val": "validation"})
    assert data.splits == ("train", "val")
    assert data.manifest("val").ids[0] == "val/pet_500"
    with pytest.raises(DataError) as error:
        opened(files, tmp_path, test="val").manifest("val")
    assert error.value.hint.startswith("it has train, validation, test;")
    assert 'val = "…"' in error.value.hint
    with pytest.raises(DataError, match="none of the splits a, b"):
        opened(files, tmp_path, train="a", test="b")


def test_a_holdout_cuts_all_there_is(tmp_path: Path) -> None:
    data = opened(pets(7, 3), tmp_path, holdout=0.3)
    train, test = data.manifest("train"), data.manifest("test")
    assert (len(train), len(test)) == (7, 3)
    stems = {f"pet_{i:03d}" for i in (*range(7), *range(500, 503))}
    assert set(train.ids) | set(test.ids) == stems
    for split, rows in {"train": train, "test": test}.items():
        for row, name in enumerate(rows.ids):
            number = int(name.removeprefix("pet_"))
            expected = Image.open(io.BytesIO(layouts.photograph(number, 16, "PNG")))
            assert np.asarray(data.image(split, row)).tolist() == np.asarray(expected).tolist()
    one = opened(pets(7, 3), tmp_path, holdout=0.3, splits={"all": "train"})
    assert len(one.manifest("train")) + len(one.manifest("test")) == 7


def test_configurations_are_those_of_the_card(tmp_path: Path) -> None:
    files = {name.replace("data/", "big/"): data for name, data in pets(6, 4).items()}
    files |= {name.replace("data/", "small/"): data for name, data in pets(2, 1).items()}
    splits = ("train", "test")
    files["README.md"] = layouts.card({"big": splits, "small": splits}, dict.fromkeys("xy", ""))
    card = layouts.card({"big": splits, "small": splits}, {"big": "big", "small": "small"})
    files["README.md"] = card
    assert len(opened(files, tmp_path, config="big").manifest("train")) == 6
    assert len(opened(files, tmp_path, config="small").manifest("train")) == 2
    for config in ("", "medium"):
        with pytest.raises(DataError, match="big") as error:
            opened(files, tmp_path, config=config)
        assert "config = " in error.value.hint
    (tmp_path / "pets-here/README.md").unlink()  # then a configuration is its folder
    here = spec_of(tmp_path / "pets-here", config="small")
    assert len(open_dataset(here).manifest("train")) == 2


# Damage


def test_damaged_files_are_named(tmp_path: Path) -> None:
    name = TEST
    whole = pets()[name]
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n"
    for place, (data, hint) in enumerate(
        ((whole[:-100], "damaged"), (b"", "damaged"), (pointer, "git lfs pull"))
    ):
        with pytest.raises(DataError, match=name) as error:
            opened(pets(**{name: data}), tmp_path / str(place)).manifest("test")
        assert hint in error.value.hint
    torn = bytearray(whole)
    torn[len(whole) // 4 : len(whole) // 2] = bytes(len(whole) // 2 - len(whole) // 4)
    with pytest.raises(DataError, match=name):
        opened(pets(**{name: bytes(torn)}), tmp_path / "torn").manifest("test")


def test_missing_files_are_counted(tmp_path: Path) -> None:
    files = pets()
    for shard in (0, 2, 3):
        files[f"data/train-{shard:05d}-of-00004.parquet"] = files[TEST]
    del files["data/train-00000-of-00001.parquet"]
    with pytest.raises(DataError, match=r"1 of 4 files are missing.*train-00001-of-00004"):
        opened(files, tmp_path)
    with pytest.raises(DataError, match="pets-here"):
        opened({"README.md": pets()["README.md"]}, tmp_path / "empty")


def test_rows_without_an_image_are_left_out_by_choice(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(layouts.photograph(1, 16, "PNG"))
    images = [*pictures(2), None, {"bytes": None, "path": str(secret)}, *pictures(1, 7)]
    data = opened(shards({"image": images, "label": [0, 1, 2, 0, 1]}), tmp_path, id="row")
    for row in (2, 3):  # the file is there, and none of the dataset's
        with pytest.raises(DataError, match=f"row {row} holds no image"):
            data.image("train", row)

    def tensor(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    bad: dict[int, str] = {}
    found = list(
        batches(
            data,
            "train",
            np.arange(5),
            tensor,
            batch_size=2,
            workers=1,
            bad_images="skip",
            on_bad=bad.__setitem__,
        )
    )
    assert [rows.tolist() for rows, _ in found] == [[0, 1], [4]]
    assert set(bad) == {2, 3}


def test_datasets_are_pickled_without_their_images(tmp_path: Path) -> None:
    files = pets(200)
    data = opened(files, tmp_path)
    data.manifest("train")
    size = len(pickle.dumps(data))
    assert size < len(files["data/train-00000-of-00001.parquet"]) / 3
    copy = pickle.loads(pickle.dumps(data))
    assert copy.image("train", 199).tobytes() == data.image("train", 199).tobytes()


# Other files than Parquet


def test_tar_shards_are_read_by_datasets_too(tmp_path: Path) -> None:
    for split, first in {"train": 0, "test": 500}.items():
        path = tmp_path / f"pets-here/{split}-0000.tar"
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for i in range(first, first + 3):
                layouts.add(tar, f"pet_{i}.png", layouts.photograph(i, 16, "PNG"))
                layouts.add(tar, f"pet_{i}.cls", str(i % 3).encode())
    data = opened({}, tmp_path, image="png", label="cls", id="__key__")
    rows = data.manifest("test")
    assert rows.ids == ("test/pet_500", "test/pet_501", "test/pet_502")
    assert rows.labels.tolist() == [2, 0, 1]
    expected = Image.open(io.BytesIO(layouts.photograph(501, 16, "PNG")))
    assert data.image("test", 1).tobytes() == expected.tobytes()


def test_image_files_are_called_by_their_path_below_the_split(tmp_path: Path) -> None:
    files = {
        f"{split}/{pet}/{i}.png": layouts.photograph(10 * place + i, 16, "PNG")
        for split in ("train", "test")
        for place, pet in enumerate(("basset", "pug"))
        for i in range(2)
    }
    data = opened(files, tmp_path)
    rows = data.manifest("test")
    assert rows.ids[0] == "test/basset/0"
    assert [data.class_names[label] for label in rows.labels] == ["basset", "basset", "pug", "pug"]
    expected = Image.open(io.BytesIO(layouts.photograph(11, 16, "PNG")))
    assert data.image("test", 3).tobytes() == expected.tobytes()


# Streams


def stream(repo: object, streaming: bool | tuple[str, ...] = True, **first: int) -> Dataset:
    return open_dataset(spec_of(repo, streaming=streaming), Access(None, first))


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "store/streams").rglob("*.arrow"))


def test_a_stream_is_its_first_rows_in_their_order(tmp_path: Path) -> None:
    whole = opened(pets(150), tmp_path)
    root = tmp_path / "pets-here"
    data = stream(root, train=130, test=2)
    rows = data.manifest("train")
    assert rows.ids == whole.manifest("train").ids[:130]
    np.testing.assert_array_equal(rows.labels, whole.manifest("train").labels[:130])
    assert not rows.stratified
    assert rows.order(5).tolist() == [0, 1, 2, 3, 4]
    assert len(data.manifest("test")) == 2
    assert data.class_names == PETS
    assert data.image("train", 129).tobytes() == whole.image("train", 129).tobytes()
    copy = pickle.loads(pickle.dumps(data))
    assert copy.image("train", 7).tobytes() == whole.image("train", 7).tobytes()


def test_a_run_knows_that_it_has_the_first_of_a_stream_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = layouts.write(pets(30), tmp_path / "pets-here")
    some, whole = spec_of(root, streaming=("train",)), spec_of(root)
    monkeypatch.setattr(api, "STATISTICS_IMAGES", 20)
    assert api.source_of(some, api.config_of()).first_alone
    assert not api.source_of(some, api.config_of(train_limit=20)).first_alone
    assert not api.source_of(whole, api.config_of()).first_alone
    monkeypatch.setattr(api, "STATISTICS_IMAGES", 40)  # more than there are
    assert not api.source_of(some, api.config_of()).first_alone


def test_what_a_stream_gave_is_kept(tmp_path: Path) -> None:
    root = layouts.write(pets(20), tmp_path / "pets-here")
    first = stream(root, train=8, test=2).manifest("train")
    assert kept(tmp_path) == ["2.arrow", "8.arrow"]
    files = [path.stat().st_mtime_ns for path in (tmp_path / "store/streams").rglob("*.arrow")]
    fewer = stream(root, train=5, test=2).manifest("train")
    assert fewer.ids == first.ids[:5]
    again = [path.stat().st_mtime_ns for path in (tmp_path / "store/streams").rglob("*.arrow")]
    assert files == again
    more = stream(root, train=12, test=2).manifest("train")
    assert more.ids[:8] == first.ids
    assert kept(tmp_path) == ["12.arrow", "2.arrow"]
    assert len(stream(root, train=1000, test=2).manifest("train")) == 20  # all there are


def test_a_stream_needs_to_know_how_much(tmp_path: Path) -> None:
    root = layouts.write(pets(), tmp_path / "pets-here")
    for split, option in {"test": "--limit 2000", "train": "--train-limit 2000"}.items():
        others = {"train": 2, "test": 2}
        del others[split]
        with pytest.raises(DataError, match=f"split '{split}' is a stream") as error:
            stream(root, **others).manifest(split)
        assert option in error.value.hint


def test_one_split_may_be_streamed(tmp_path: Path) -> None:
    root = layouts.write(pets(20, 6), tmp_path / "pets-here")
    data = stream(root, ("train",), train=4)
    assert len(data.manifest("train")) == 4
    assert not data.manifest("train").stratified
    assert len(data.manifest("test")) == 6
    assert data.manifest("test").stratified


def test_a_stream_of_names_needs_their_list(tmp_path: Path) -> None:
    files = shards({"image": pictures(3), "label": ["pug", "basset", "pug"]})
    spec = spec_of(layouts.write(files, tmp_path / "pets-here"), streaming=True)
    access = Access(None, {"train": 1, "test": 2})
    with pytest.raises(DataError, match="its labels are names") as error:
        open_dataset(spec, access).manifest("test")
    assert "classes = " in error.value.hint
    listed = replace(spec, classes=("basset", "pug", "poodle"))
    assert open_dataset(listed, access).manifest("test").labels.tolist() == [1, 0]


def test_a_stream_without_its_columns_says_what_there_is(tmp_path: Path) -> None:
    root = layouts.write(pets(), tmp_path / "pets-here")
    spec = spec_of(root, streaming=True, label="breed")
    with pytest.raises(DataError, match="no column 'breed'") as error:
        open_dataset(spec, Access(None, {"train": 1, "test": 1})).manifest("test")
    assert "image, label" in error.value.hint
    assert kept(tmp_path) == []


# The page


def entries_of_the_page(tmp_path: Path) -> list[DatasetSpec]:
    text = (CONTENT / "docs/datasets.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    specs = []
    for place, block in enumerate(block for block in blocks if "[hub]" in block):
        path = tmp_path / f"{place}.toml"
        path.write_text(block)
        specs.append(read_spec(DatasetSpec, path, ("pets", "imagenet-some")[place]))
    return specs


def test_the_entries_of_the_page_do_what_it_says(hub: HubStandIn, tmp_path: Path) -> None:
    plain, streamed = entries_of_the_page(tmp_path)
    rows = {"image": pictures(3), "breed": ["pug", "basset", "pug"]}
    hub.commit("someone/pets", shards(rows, {"image": layouts.IMAGE}), kind="dataset")
    assert open_dataset(plain).manifest("test").labels.tolist() == [1, 0, 1]
    truth = layouts.imagenet()
    hub.commit("ILSVRC/imagenet-1k", layouts.imagenet_files(truth), kind="dataset")
    data = open_dataset(streamed, Access(None, {"train": 5}))
    assert len(data.manifest("train")) == 5
    assert set(data.manifest("train").ids) < {picture.stem for picture in truth["train"]}
    assert set(data.manifest("val").ids) == {picture.stem for picture in truth["val"]}
    assert data.manifest("val").stratified


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A hub that huggingface_hub and datasets of this process use."""
    with HubStandIn() as hub:
        hub.use(monkeypatch, tmp_path)
        url = hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}"
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", url)
        yield hub


def downloads(hub: HubStandIn) -> list[str]:
    """Which data files were downloaded, in part or whole."""
    return [path for path in hub.gets() if path.startswith("/cdn/")]


def test_a_dataset_is_downloaded_once(hub: HubStandIn, tmp_path: Path) -> None:
    commit = hub.commit(REPO, pets(), kind="dataset")
    data = open_dataset(spec_of())
    assert downloads(hub) == []
    assert data.manifest("test").ids[0] == "test/pet_500"
    assert data.resolved_revision == commit
    assert data.image("test", 0).size == (16, 16)
    assert len(downloads(hub)) == 2  # class names are those of both splits
    hub.requests.clear()
    again = open_dataset(spec_of())
    assert again.manifest("test").sha256 == data.manifest("test").sha256
    assert hub.requests == []
    asked = lock.Asked("dataset", REPO)
    assert lock.commit_of(asked) == commit
    here = opened(pets(), tmp_path)
    assert here.manifest("test").sha256 == data.manifest("test").sha256


def test_only_the_splits_of_the_entry_are_downloaded(hub: HubStandIn) -> None:
    files = pets()
    files["data/extra-00000-of-00001.parquet"] = layouts.parquet(
        {"image": pictures(9, 700), "label": [0] * 9}, FEATURES
    )
    files["README.md"] = layouts.card({"default": ("train", "test", "extra")})
    hub.commit(REPO, files, kind="dataset")
    open_dataset(spec_of()).fetch()
    assert len(downloads(hub)) == 2


def test_a_split_whose_classes_are_known_comes_alone(hub: HubStandIn) -> None:
    """The train split of ImageNet is 150 GB: whoever looks at the other does not wait for it."""
    hub.commit("ILSVRC/imagenet-1k", layouts.imagenet_files(layouts.imagenet()), kind="dataset")
    spec = replace(Registry.load().dataset("imagenet-1k"), folder=None, tar=None)
    data = open_dataset(spec)
    assert len(data.manifest("val")) == 8
    assert data.label_names == {}
    assert data.class_names[0] == "tench"
    assert len(downloads(hub)) == 1


def test_what_is_locked_stays(hub: HubStandIn) -> None:
    first = hub.commit(REPO, pets(5), kind="dataset")
    assert len(open_dataset(spec_of()).manifest("train")) == 5
    second = hub.commit(REPO, pets(9), kind="dataset")
    assert open_dataset(spec_of()).resolved_revision == first
    assert len(open_dataset(spec_of()).manifest("train")) == 5
    other = open_dataset(spec_of(revision=second))
    assert len(other.manifest("train")) == 9
    lock.lock_path().unlink()
    fresh = open_dataset(spec_of())
    assert fresh.resolved_revision == second
    assert len(fresh.manifest("train")) == 9


def test_a_hub_that_nobody_answers_for_is_said_at_once(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    hub.commit(REPO, pets(), kind="dataset")
    resolve_revision(REPO, None, kind="dataset", by="pets")
    nowhere = "http://127.0.0.1:9"
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    started = time.perf_counter()
    with pytest.raises(DataError, match="cannot be reached"):
        open_dataset(spec_of())
    assert time.perf_counter() - started < 10
    assert "Retrying" not in caplog.text


def test_fetch_says_what_came(hub: HubStandIn) -> None:
    commit = hub.commit(REPO, pets(), kind="dataset")
    assert open_dataset(spec_of()).fetch() == (f"{REPO} at {commit}: train 5 images, test 3 images")
    streaming = open_dataset(spec_of(streaming=("train",)))
    assert "train is streamed when it is run, test 3 images" in streaming.fetch()


def test_without_downloads_only_what_is_here_is_read(hub: HubStandIn) -> None:
    hub.commit(REPO, pets(), kind="dataset")
    spec, access = spec_of(), Access(None, {}, download=False)
    with pytest.raises(DataError, match="not fetched yet:  saebench fetch pets"):
        open_dataset(spec, access)
    assert hub.requests == []
    open_dataset(spec)
    hub.requests.clear()
    with pytest.raises(DataError, match="not fetched yet"):  # the files' names alone
        open_dataset(spec, access)
    some = spec_of(streaming=("train",))
    little = Access(None, {"train": 2}, download=False)
    with pytest.raises(DataError, match="not fetched yet"):
        open_dataset(some, little)
    assert hub.requests == []
    open_dataset(some, replace(little, download=True)).fetch()
    open_dataset(spec).fetch()
    hub.requests.clear()
    assert len(open_dataset(some, little).manifest("train")) == 2
    assert len(open_dataset(spec, access).manifest("test")) == 3
    assert hub.requests == []


READ = f"""
import sys
from saebench.data import open_dataset
from saebench.errors import SaebenchError
from saebench.specs import DatasetSpec, HubForm
spec = DatasetSpec(name="pets", source="images", hub=HubForm(repo="{REPO}"))
try:
    data = open_dataset(spec)
    what = data.fetch() if sys.argv[1:] else data.manifest("test").sha256
    print(what, data.image("test", 1).size)
except SaebenchError as error:
    print(error)
"""


def test_offline_after_fetch(hub: HubStandIn, tmp_path: Path) -> None:
    """As on a cluster: a login node fetches, a compute node without internet reads."""
    hub.commit(REPO, pets(), kind="dataset")

    def run(*argv: str, **more: str) -> str:
        env = hub.env(tmp_path, SAEBENCH_STORE=str(tmp_path / "store"), **more)
        done = subprocess.run(
            [sys.executable, "-c", READ, *argv],
            env=env,
            capture_output=True,
            text=True,
            cwd=os.getcwd(),
            check=True,
        )
        return done.stdout.strip()

    assert "3 images" in run("fetch")
    hub.requests.clear()
    there = opened(pets(), tmp_path).manifest("test").sha256
    assert run(HF_HUB_OFFLINE="1") == f"{there} (16, 16)"
    assert hub.requests == []


def test_offline_and_not_fetched(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(REPO, pets(), kind="dataset")

    def offline(is_so: bool) -> None:
        hub.use(monkeypatch, tmp_path, offline=is_so)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", is_so)

    def refused() -> None:
        with pytest.raises(DataError, match=r"pets: .*HF_HUB_OFFLINE is set") as error:
            open_dataset(spec_of()).manifest("test")
        assert "saebench fetch pets" in error.value.hint

    offline(True)
    refused()  # nothing is known
    offline(False)
    open_dataset(spec_of())
    offline(True)
    refused()  # the files' names are known
    offline(False)
    shutil.rmtree(tmp_path / "store")
    offline(True)
    refused()  # the commit is known
    assert downloads(hub) == []


@pytest.mark.parametrize(("token", "said"), [(None, "hf auth login"), ("reader", "accept its")])
def test_a_gated_dataset(
    token: str | None, said: str, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(REPO, pets(), kind="dataset")
    hub.repo(REPO, "dataset").gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(DataError, match=r"pets: .*gated") as error:
        open_dataset(spec_of())
    assert said in error.value.hint
    assert f"{hub.endpoint}/datasets/{REPO}" in error.value.hint
    monkeypatch.setenv("HF_TOKEN", "licensed")
    assert len(open_dataset(spec_of()).manifest("test")) == 3


def test_a_disk_without_room_is_told_before_anything_comes(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pets()
    hub.commit(REPO, files, kind="dataset")
    data = open_dataset(spec_of())
    needed = 2 * len(files[TEST])
    room = shutil.disk_usage("/")._replace(free=needed - 1)
    with monkeypatch.context() as context:
        context.setattr(shutil, "disk_usage", lambda path: room)
        with pytest.raises(DataError, match=r"split 'test' of .* needs .* GB of disk") as error:
            data.form.rows("test")  # type: ignore[attr-defined]
        assert 'streaming = ["test"]' in error.value.hint
        assert downloads(hub) == []
        room = room._replace(free=needed)
        assert len(data.form.rows("test")) == 3  # type: ignore[attr-defined]


def test_other_places_are_named_where_the_hub_fails(hub: HubStandIn, tmp_path: Path) -> None:
    spec = replace(spec_of(), folder=FolderForm(), tar=TarForm())
    with pytest.raises(DataError, match="no such dataset") as error:
        open_dataset(spec, Access(tmp_path))
    for form in ("folder", "tar", "hub"):
        assert f"[{form}] {tmp_path / 'pets'}: " in error.value.what


def test_a_configuration_without_a_card_is_its_folder(hub: HubStandIn) -> None:
    """As in the copies that the hub makes: <configuration>/<split>/0000.parquet."""
    files = {
        f"{config}/{split}/0000.parquet": layouts.parquet(
            {"image": pictures(n), "label": [0] * n}, FEATURES
        )
        for config, n in {"big": 4, "small": 2}.items()
        for split in ("train", "test")
    }
    hub.commit(REPO, files, kind="dataset", branch="refs/convert/parquet")
    revision = "refs/convert/parquet"
    for config, n in {"big": 4, "small": 2}.items():
        data = open_dataset(spec_of(revision=revision, config=config))
        assert len(data.manifest("test")) == n
    with pytest.raises(DataError, match="'medium' not found"):
        open_dataset(spec_of(revision=revision, config="medium"))


def test_what_is_not_there(hub: HubStandIn) -> None:
    hub.commit(REPO, pets(), kind="dataset")
    with pytest.raises(DataError, match="no such dataset") as error:
        open_dataset(spec_of("someone/birds"))
    assert "hf auth login" in error.value.hint
    with pytest.raises(DataError, match="no such revision"):
        open_dataset(spec_of(revision="v9"))
    hub.commit("someone/scripted", {"scripted.py": b"import os", "x.txt": b""}, kind="dataset")
    with pytest.raises(DataError, match="made by a script") as error:
        open_dataset(spec_of("someone/scripted"))
    assert "refs/convert/parquet" in error.value.hint
    hub.commit("someone/text", {"notes.csv": b"a,b\n1,2\n"}, kind="dataset")
    with pytest.raises(DataError, match="no column 'image'"):
        open_dataset(spec_of("someone/text")).manifest("train")


def test_a_broken_download_is_told_and_goes_on(hub: HubStandIn) -> None:
    hub.commit(REPO, pets(), kind="dataset")
    data = open_dataset(spec_of())
    hub.failing[:] = [404] * 40
    with pytest.raises(DataError, match=r"the hub at .* answers 404"):
        data.manifest("test")
    hub.failing.clear()
    assert len(data.manifest("test")) == 3


def test_a_stream_downloads_only_what_it_takes(hub: HubStandIn, tmp_path: Path) -> None:
    rows = {"image": pictures(40), "label": [0] * 40}
    files = {"README.md": layouts.card({"default": ("train", "test")})}
    for shard in range(3):
        files[f"data/train-{shard:05d}-of-00003.parquet"] = layouts.parquet(rows, FEATURES)
    files[TEST] = pets()[TEST]
    commit = hub.commit(REPO, files, kind="dataset")
    data = stream(REPO, train=10, test=2)
    assert len(data.manifest("train")) == 10
    assert data.resolved_revision == commit
    assert len({path for path in downloads(hub)}) == 2  # the first train file, and the test file
    assert not list((tmp_path / "hf/hub").rglob("*.parquet"))
    hub.requests.clear()
    assert stream(REPO, train=10, test=2).manifest("train").ids == data.manifest("train").ids
    assert downloads(hub) == []
