"""Captions of images: where each form has them, that they stay with their image, what is refused.

An image is a picture of a number and its caption says that number, so that a caption at the wrong
row shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saebench.api import source_of
from saebench.data import Access, Dataset, open_dataset
from saebench.data.captions import captions_sha256
from saebench.errors import DataError, SpecError
from saebench.runconfig import RunConfig
from saebench.specs import DatasetSpec, FolderForm, HubForm, TarForm
from saebench.strict import parse_spec
from tests import dataset_layouts as layouts
from tests.image_collections import number_of, picture, write, write_tar

CLASSES = ("cat", "dog")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf/datasets")
    with layouts.quiet():
        yield tmp_path / "store"


def said(number: int) -> str:
    """The caption of a picture: not ASCII, with a comma and a quotation mark."""
    return f'número {number}, a "picture"'


def check(dataset: Dataset, split: str, n: int) -> None:
    assert dataset.has_captions
    captions = dataset.captions(split)
    assert len(captions) == len(dataset.manifest(split)) == n
    for row in range(n):
        assert captions[row] == said(number_of(dataset.image(split, row)))
    assert list(captions) == [captions[row] for row in range(n)]


# Folders


def table(numbers: Sequence[int], split: bool = False, **captions: str) -> bytes:
    """A table of `<class>/<number>.png`, in an order that is not that of the rows."""
    lines = ["file\tlabel\tsays\tsplit" if split else "file\tlabel\tsays"]
    for number in sorted(numbers, key=lambda number: -number * 7 % 11):
        caption = captions.get(f"of_{number}", "  " + said(number).replace('"', '""') + " ")
        where = f"{CLASSES[number % 2]}/{number:02d}"
        end = ("\ttest" if number % 3 else "\ttrain") if split else ""
        lines.append(f'{where}\t{CLASSES[number % 2]}\t"{caption}"{end}')
    return "\n".join(lines).encode()


def folder(root: Path, files: Mapping[str, bytes], **changes: Any) -> Dataset:
    write(root / "own", files)
    form = FolderForm(labels="t.tsv", caption="says", **changes.pop("form", {}))
    spec = DatasetSpec(name="own", source="images", folder=form, **changes)
    return open_dataset(spec, Access(root=root))


def pictures(numbers: Sequence[int], below: str = "") -> dict[str, bytes]:
    return {f"{below}{CLASSES[n % 2]}/{n:02d}.png": picture(n) for n in numbers}


def test_a_table_with_a_holdout(tmp_path: Path) -> None:
    dataset = folder(tmp_path, {**pictures(range(20)), "t.tsv": table(range(20))}, holdout=0.4)
    check(dataset, "test", 8)
    check(dataset, "train", 12)
    check(dataset, "all", 20)
    check(pickle.loads(pickle.dumps(dataset)), "test", 8)


def test_a_table_with_splits(tmp_path: Path) -> None:
    files = {**pictures(range(12)), "t.tsv": table(range(12), split=True)}
    dataset = folder(tmp_path, files)
    check(dataset, "test", 8)
    check(dataset, "train", 4)


def test_a_table_beside_split_folders(tmp_path: Path) -> None:
    """Only the images of the test split are in it: the others have the class of their folder."""
    files = {**pictures(range(6), "train/"), **pictures(range(6, 14), "test/")}
    dataset = folder(tmp_path, {**files, "t.tsv": table(range(6, 14))})
    check(dataset, "test", 8)
    why = r"split 'train': 6 of 6 images have no caption, the first is 'train/cat/00'"
    with pytest.raises(DataError, match=why):
        dataset.captions("train")


def test_captions_are_no_part_of_a_manifest(tmp_path: Path) -> None:
    files = {**pictures(range(8)), "t.tsv": table(range(8))}
    with_them = folder(tmp_path, files, holdout=0.5)
    plain = replace(with_them.spec, folder=FolderForm(labels="t.tsv"))
    without = open_dataset(plain, Access(root=tmp_path))
    assert without.manifest("test").sha256 == with_them.manifest("test").sha256
    assert (without.has_captions, without.captions("test")) == (False, ())


def test_an_image_without_a_caption_is_named(tmp_path: Path) -> None:
    """It is told when captions are asked for: a run that needs none goes on."""
    files = {**pictures(range(8)), "t.tsv": table(range(8), of_3=" ", of_5="")}
    dataset = folder(tmp_path, files, holdout=0.5)
    assert len(dataset.manifest("test")) == 4
    with pytest.raises(DataError, match=r"split 'all': 2 of 8 .*, the first is 'dog/03'") as error:
        dataset.captions("all")
    assert "remove `caption`" in error.value.hint


@pytest.mark.parametrize(
    ("form", "kind", "why"),
    [
        ({"caption": "tells"}, DataError, "no column 'tells', but: file, label, says"),
        ({"labels": None}, SpecError, r"\[folder\] caption = 'says' is a column of a table"),
    ],
)
def test_what_names_no_column(tmp_path: Path, form: dict, kind: type, why: str) -> None:
    write(tmp_path / "own", {**pictures(range(8)), "t.tsv": table(range(8))})
    whole = FolderForm(**{"labels": "t.tsv", "caption": "says", **form})
    spec = DatasetSpec(name="own", source="images", folder=whole, holdout=0.5)
    with pytest.raises(kind, match=why) as error:
        open_dataset(spec, Access(root=tmp_path))
    assert "labels = " in error.value.hint or 'caption = "…"' in error.value.hint


def test_a_caption_with_a_nul_is_no_text(tmp_path: Path) -> None:
    files = {**pictures(range(8)), "t.tsv": table(range(8), of_3="a\0b")}
    with pytest.raises(DataError, match=r"caption of 'dog/03' in .*t\.tsv is no text: 'a\\x00b'"):
        folder(tmp_path, files, holdout=0.5)


# Tar shards


def samples(numbers: Sequence[int], **other: bytes) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for number in numbers:
        about = {"says": said(number), "all": [said(number), "second"], "n": number}
        files[f"{number:02d}.png"] = picture(number)
        files[f"{number:02d}.cls"] = str(number % 2).encode()
        files[f"{number:02d}.txt"] = f"{said(number)}\n".encode()
        files[f"{number:02d}.json"] = json.dumps(about).encode()
    return {**files, **{name.replace("_", "."): data for name, data in other.items()}}


def tar(root: Path, files: Mapping[str, bytes], caption: str | None, **changes: Any) -> Dataset:
    write_tar(root / "own/train.tar", samples([0, 1]))
    names = sorted(files)
    write_tar(root / "own/test-1.tar", {name: files[name] for name in names if name < "05"})
    write_tar(root / "own/test-0.tar", {name: files[name] for name in names if name >= "05"})
    form = TarForm(caption=caption, **changes)
    return open_dataset(DatasetSpec(name="own", source="images", tar=form), Access(root=root))


@pytest.mark.parametrize("caption", ["txt", "json:says", "json:all"])
def test_captions_of_samples(tmp_path: Path, caption: str) -> None:
    dataset = tar(tmp_path, samples(range(9)), caption)
    check(dataset, "test", 9)
    check(dataset, "train", 2)
    check(pickle.loads(pickle.dumps(dataset)), "test", 9)


def test_a_long_caption_is_read_whole(tmp_path: Path) -> None:
    long = "long " * 400 + "ü"
    dataset = tar(tmp_path, samples(range(3), **{"01_txt": long.encode()}), "txt")
    assert dataset.captions("test")[1] == long


def test_an_index_made_before_there_were_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saebench.data.listings.WORTH", 1)
    first = tar(tmp_path, samples(range(9)), None)
    for path in (tmp_path / "own").iterdir():
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    ids = first.manifest("test").ids
    again = replace(first.spec, tar=TarForm(caption="txt"))
    check(open_dataset(again, Access(root=tmp_path)), "test", 9)
    with monkeypatch.context() as patch:  # both are remembered
        patch.setattr("saebench.data.tarrows.members", lambda path: pytest.fail("it is read again"))
        check(open_dataset(again, Access(root=tmp_path)), "test", 9)
        plain = open_dataset(first.spec, Access(root=tmp_path))
        assert plain.manifest("test").ids == ids
        assert not plain.has_captions


@pytest.mark.parametrize(
    ("caption", "other", "why"),
    [
        ("txt", {"03_txt": b" \n"}, "1 of 4 images have no caption, the first is 'test/03'"),
        ("json:title", {}, "4 of 4 images have no caption, the first is 'test/00'"),
        ("json:all", {"02_json": b'{"all": []}'}, "1 of 4 .*'test/02'"),
        ("json:n", {}, r"test-1\.tar: '00\.json' holds no caption: .*n is 0"),
        ("json:says", {"02_json": b"{"}, r"'02\.json' holds no caption"),
        ("json:says", {"02_json": b"[1]"}, r"'02\.json' holds no caption"),
        ("txt", {"02_txt": b"\xff\xfe"}, r"'02\.txt' holds no caption"),
        ("txt", {"02_txt": b"a\0b"}, r"caption of '02\.png' in .*test-1\.tar is no text"),
        ("json:says", {"02_json": b'{"says": "\\ud800"}'}, r"caption of '02\.png' .*is no text"),
    ],
)
def test_samples_without_a_caption(
    tmp_path: Path, caption: str, other: dict[str, bytes], why: str
) -> None:
    files = samples(range(4), **other)
    dataset = tar(tmp_path, files, caption)
    with pytest.raises(DataError, match=why):
        dataset.captions("test")


@pytest.mark.parametrize(("label", "caption"), [("folder", "txt"), ("cls", "text")])
def test_what_a_caption_of_a_tar_may_be(tmp_path: Path, label: str, caption: str) -> None:
    with pytest.raises(SpecError, match=rf"\[tar\] caption is '{caption}'") as error:
        tar(tmp_path, samples(range(2)), caption, label=label)
    assert '"json:<key>"' in error.value.hint


# The hub


def hub(root: Path, columns: Mapping[str, Any], caption: str, **form: Any) -> Dataset:
    n = len(next(iter(columns.values())))
    images = [{"bytes": picture(number), "path": None} for number in range(n)]
    rows = {"image": images, "label": [number % 2 for number in range(n)], **columns}
    features: dict[str, object] = {"image": layouts.IMAGE, "label": layouts.class_label(CLASSES)}
    string = {"dtype": "string", "_type": "Value"}
    kinds = {
        "says": string,
        "all": {"feature": string, "_type": "List"},
        "n": {"dtype": "int64", "_type": "Value"},
        "about": {"says": string},
    }
    features |= {name: kinds[name] for name in columns}
    data = layouts.parquet(rows, features, rows_each=2)
    files = {f"data/{split}-00000-of-00001.parquet": data for split in ("train", "test")}
    layouts.write(files, root / "here")
    form_ = HubForm(repo=str(root / "here"), caption=caption, **form)
    spec = DatasetSpec(name="own", source="images", hub=form_)
    return open_dataset(spec, Access(None, {"train": 3, "test": 4}))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("caption", ["says", "all", "about.says"])
def test_captions_of_a_column(tmp_path: Path, caption: str, streaming: bool) -> None:
    values = {
        "says": [said(number) + " " for number in range(7)],
        "all": [[said(number), "second"] for number in range(7)],
        "about": [{"says": said(number)} for number in range(7)],
    }
    column = caption.partition(".")[0]
    dataset = hub(tmp_path, {column: values[column]}, caption, streaming=streaming)
    check(dataset, "test", 4 if streaming else 7)


@pytest.mark.parametrize(
    ("columns", "caption", "why"),
    [
        ({"says": ["a", None, "b"]}, "says", "1 of 3 images have no caption, .*'test/00000001'"),
        ({"all": [["a"], [], ["b"]]}, "all", "1 of 3 images have no caption, .*'test/00000001'"),
        ({"n": [1, 2, 3]}, "n", "'n' is int64, and captions are texts or lists of texts"),
        ({"says": ["a", "b", "c"]}, "tells", "there is no column 'tells'"),
    ],
)
def test_columns_that_hold_none(
    tmp_path: Path, columns: dict[str, list], caption: str, why: str
) -> None:
    with pytest.raises(DataError, match=why):
        hub(tmp_path, columns, caption).captions("test")


# What they are part of


def test_the_captions_of_the_evaluated_images_are_hashed_in_their_order(tmp_path: Path) -> None:
    dataset = folder(tmp_path, {**pictures(range(20)), "t.tsv": table(range(20))}, holdout=0.4)
    config = RunConfig(data_root=str(tmp_path), limit=5)
    source = source_of(dataset.spec, config)
    rows = dataset.manifest("test").order(5)
    order = [said(number_of(dataset.image("test", row))) for row in rows.tolist()]
    expected = hashlib.sha256(b"saebench captions 1\n" + "".join(f"{c}\0" for c in order).encode())
    assert source.texts_identity(None) == {"captions": expected.hexdigest()}
    assert captions_sha256(order[::-1]) != expected.hexdigest()
    plain = replace(dataset.spec, folder=FolderForm(labels="t.tsv"))
    assert source_of(plain, config).texts_identity(None) == {}


def test_the_keys_of_an_entry() -> None:
    raw = {
        "source": "images",
        "folder": {"labels": "t.csv", "caption": "c"},
        "tar": {"caption": "txt"},
        "hub": {"repo": "a/b", "caption": "c"},
    }
    spec = parse_spec(DatasetSpec, raw, name="own", path="own.toml")
    assert spec.hub is not None
    assert spec.hub.caption == "c"
    with pytest.raises(SpecError, match=r"unknown key 'tar\.captoin'") as error:
        parse_spec(DatasetSpec, {**raw, "tar": {"captoin": "txt"}}, name="own", path="own.toml")
    assert error.value.hint == "did you mean 'caption'?"


def test_millions_of_captions_take_the_space_of_their_letters() -> None:
    from saebench.data.texts import Picked, Texts

    texts = Texts.of(f"caption {number}" for number in range(1000))
    some = Picked(texts, np.array([7, 3, 999]))
    assert list(some) == ["caption 7", "caption 3", "caption 999"]
    assert some[-1] == "caption 999"
    assert texts.data.nbytes == sum(len(text) + 1 for text in texts)
