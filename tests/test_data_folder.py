"""Image folders and tables in the layouts people have, damaged ones included."""

from __future__ import annotations

import os
import pickle
import re
import time
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saebench.api import source_of
from saebench.data import Access, Dataset, open_dataset
from saebench.data.imagenet import wnids
from saebench.data.manifest import stratified_order
from saebench.data.scan import scan
from saebench.errors import DataError, ImageError, SpecError
from saebench.paths import CONTENT
from saebench.registry import Registry
from saebench.runconfig import RunConfig
from saebench.specs import DatasetSpec, FolderForm, HubForm
from saebench.strict import parse_spec
from tests.image_collections import SPECIES, WNIDS, imagenet_files, number_of, picture, write

IMAGENET = DatasetSpec(
    name="imagenet-1k",
    source="images",
    test="val",
    classes="imagenet-1k",
    id_pattern=r"(n\d{8}_\d+|ILSVRC2012_val_\d{8})",
    folder=FolderForm(),
)
OWN = DatasetSpec(name="own", source="images", folder=FolderForm())


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def own(root: Path, files: Mapping[str, bytes], **changes: Any) -> Dataset:
    """A dataset of one's own, in `<data root>/own`."""
    write(root / "own", files)
    return open_dataset(replace(OWN, **changes), Access(root=root))


def rows_of(dataset: Dataset, split: str) -> dict[str, tuple[int, int]]:
    """Id -> (label, number of the picture)."""
    rows = dataset.manifest(split)
    numbers = [number_of(dataset.image(split, row)) for row in range(len(rows))]
    return dict(zip(rows.ids, zip(rows.labels.tolist(), numbers, strict=True), strict=True))


SMALL = {
    "train/cat/1.png": picture(1),
    "train/cat/deep/er/2.PNG": picture(2),
    "train/dog/1.png": picture(3),
    "test/cat/1.png": picture(4),
    "test/eel/9.jpeg": picture(5),
}


# Layouts


def test_imagenet_as_it_is_unpacked(tmp_path: Path):
    write(tmp_path / "imagenet-1k", imagenet_files())
    dataset = open_dataset(IMAGENET, Access(root=tmp_path))
    assert dataset.splits == ("train", "val")
    train, val = dataset.manifest("train"), dataset.manifest("val")
    assert len(train) == len(val) == 12
    for name, label in zip(train.ids, train.labels, strict=True):
        wnid, _, number = name.partition("_")
        assert wnids()[label] == wnid
        assert int(number) % 37 == 0
    assert sorted(val.ids) == [f"ILSVRC2012_val_{i:08d}" for i in range(1, 13)]
    assert set(val.labels) == {wnids().index(wnid) for wnid in WNIDS}
    assert val.labels[list(val.ids).index("ILSVRC2012_val_00000002")] == wnids().index(WNIDS[1])
    assert number_of(dataset.image("val", 0)) % 2 == 1
    assert dataset.class_names[train.labels[0]] == "tench"
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.manifest("val").sha256 == val.sha256
    assert number_of(copy.image("val", 5)) == number_of(dataset.image("val", 5))


def test_imagenet_as_kaggle_has_it(tmp_path: Path):
    """A flat `val/`, boxes in the table's labels, and names without a suffix."""
    plain = open_dataset(
        IMAGENET, Access(root=write(tmp_path / "a" / "imagenet-1k", imagenet_files()).parent)
    )
    top, lines, files = "ILSVRC/Data/CLS-LOC", ["ImageId,PredictionString"], {}
    for name, data in imagenet_files().items():
        split, wnid, file = name.split("/")
        if split == "val":
            name = f"val/{file}"
            lines.append(f"{file.removesuffix('.JPEG')},{wnid} 111 108 330 230 ")
        files[f"{top}/{name}"] = data
    files["LOC_val_solution.csv"] = "\r\n".join(lines).encode()
    form = FolderForm(
        splits={"train": f"{top}/train", "val": f"{top}/val"},
        labels="LOC_val_solution.csv",
        file="ImageId",
        label="PredictionString",
    )
    write(tmp_path / "b" / "imagenet-1k", files)
    kaggle = open_dataset(replace(IMAGENET, folder=form), Access(root=tmp_path / "b"))
    for split in ("train", "val"):
        assert kaggle.manifest(split).sha256 == plain.manifest(split).sha256
        assert rows_of(kaggle, split) == rows_of(plain, split)


def test_inat_by_its_official_folders(tmp_path: Path):
    files = {
        f"{split}/{folder}/{i:08x}-da66-4193-aa22-e97e5191ef25.jpg": picture(i)
        for i, (split, folder) in enumerate(
            (split, folder) for split in ("train", "train_mini", "val") for folder in SPECIES
        )
    }
    write(tmp_path / "inat", files)
    spec = replace(
        IMAGENET,
        name="inat21-mini",
        train="train_mini",
        classes="inat21",
        id_pattern=r"/([^/]+)\.\w+$",
        folder=FolderForm(root=str(tmp_path / "inat")),
    )
    dataset = open_dataset(spec)
    assert dataset.splits == ("train_mini", "val")
    rows = dataset.manifest("val")
    assert rows.labels.tolist() == [0, 5, 9990]
    assert rows.ids[0] == "00000006-da66-4193-aa22-e97e5191ef25"
    named = {level: dataset.label_names[level][values[1]] for level, values in rows.levels.items()}
    assert list(named.values()) == SPECIES[1].split("_")[1:7]
    assert dataset.class_names[9990] == "Plantago novae-angliae"


def test_a_folder_of_ones_own(tmp_path: Path):
    dataset = own(tmp_path, SMALL)
    assert dataset.class_names == ("cat", "dog", "eel")
    assert dataset.text_names == {"default": ("cat", "dog", "eel")}
    assert rows_of(dataset, "train") == {
        "train/cat/1": (0, 1),
        "train/cat/deep/er/2": (0, 2),
        "train/dog/1": (1, 3),
    }
    assert rows_of(dataset, "test").keys() == {"test/cat/1", "test/eel/9"}
    assert dataset.manifest("test").labels.tolist() == [0, 2]
    source = source_of(replace(OWN), RunConfig(data_root=str(tmp_path)))
    assert (source.n_images, source.n_train) == (2, 3)


def test_split_folders_may_be_called_otherwise(tmp_path: Path):
    files = {name.replace("train/", "Training Set/"): data for name, data in SMALL.items()}
    form = FolderForm(splits={"train": "Training Set", "test": "test", "val": "none"})
    dataset = own(tmp_path, files, folder=form)
    assert dataset.splits == ("train", "test")
    assert dataset.manifest("train").sha256 == own(tmp_path / "b", SMALL).manifest("train").sha256


def test_the_root_of_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "pictures", SMALL)
    entry = write(tmp_path / "registry", {"own.toml": b""}) / "own.toml"
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in (str(tmp_path / "pictures"), "../pictures", "~/pictures"):
        spec = replace(OWN, path=str(entry), folder=FolderForm(root=root))
        assert len(open_dataset(spec).manifest("train")) == 3
    assert len(own(tmp_path, SMALL, folder=None).manifest("train")) == 3, "no form is [folder]"


# Holdout


def test_a_holdout_cuts_the_stratified_order(tmp_path: Path):
    files = {f"{name}/{i}.png": picture(i) for name in ("a", "b") for i in range(10)}
    dataset = own(tmp_path, files, holdout=0.3)
    ids = tuple(sorted(name.removesuffix(".png") for name in files))
    labels = np.array([0 if name.startswith("a") else 1 for name in ids])
    order = stratified_order("own", ids, labels)
    test, train = dataset.manifest("test"), dataset.manifest("train")
    assert set(test.ids) == {ids[row] for row in order[:6]}
    assert set(train.ids) == {ids[row] for row in order[6:]}
    assert np.bincount(test.labels).tolist() == [3, 3]
    assert dataset.manifest("all").ids == ids
    for split in ("test", "train", "all"):
        for name, (_, number) in rows_of(dataset, split).items():
            assert int(name.split("/")[1]) == number
    assert dataset.splits == ("train", "test", "all")
    with pytest.raises(DataError, match="no split 'val'") as error:
        dataset.manifest("val")
    assert error.value.hint == "its splits: train, test, all"


@pytest.mark.parametrize(
    ("n", "share", "why", "hint"),
    [
        (4, 0.1, "makes 0 of 4 images the test split, and leaves 4", "write holdout = 0.25"),
        (4, 0.9, "makes 4 of 4 images the test split, and leaves 0", "write holdout = 0.75"),
        (3, 0.1, "makes 0 of 3", "write holdout = 0.333333"),
        (1, 0.6, "makes 1 of 1", "add images"),
    ],
)
def test_a_holdout_that_leaves_nothing(tmp_path: Path, n: int, share: float, why: str, hint: str):
    files = {f"a/{i}.png": picture(i) for i in range(n)}
    for split in ("train", "test"):
        with pytest.raises(DataError, match=why) as error:
            own(tmp_path, files, holdout=share).manifest(split)
        assert hint in error.value.hint
    if hint.startswith("write"):
        mended = own(tmp_path, files, holdout=float(hint.split()[-1]))
        assert len(mended.manifest("train")) + len(mended.manifest("test")) == n


# Tables


def test_a_table_with_a_holdout(tmp_path: Path):
    files = {f"{i}.png": picture(i) for i in range(8)}
    lines = ["file,imagenet_class,author", *(f"{i}.png,{i % 2 + 5},someone" for i in range(8))]
    files["photos.csv"] = ("\ufeff" + "\n".join(lines)).encode()
    form = FolderForm(labels="photos.csv", label="imagenet_class")
    dataset = own(tmp_path, files, folder=form, holdout=0.5, classes="imagenet-1k")
    assert rows_of(dataset, "all") == {str(i): (i % 2 + 5, i) for i in range(8)}
    assert len(dataset.manifest("test")) == 4
    assert dataset.class_names[5] == "electric ray"


def test_a_table_with_splits_and_names(tmp_path: Path):
    files = {f"images/{i}.png": picture(i) for i in range(4)}
    rows = ["images/3.png\tdog\t0", "images/0\tcat\t1", "./images/2.png\tcat\t0",
            "images\\1.png\tdog\t2"]  # fmt: skip
    files["l.tsv"] = "\n".join(["file\tlabel\tsplit", *rows]).encode()
    form = FolderForm(labels="l.tsv", splits={"train": "0", "test": "1"})
    dataset = own(tmp_path, files, folder=form)
    assert dataset.splits == ("train", "test")
    assert rows_of(dataset, "train") == {"train/images/2": (0, 2), "train/images/3": (1, 3)}
    assert rows_of(dataset, "test") == {"test/images/0": (0, 0)}
    with pytest.raises(DataError, match="no split 'val'") as error:
        dataset.manifest("val")
    assert "0, 1, 2" in error.value.hint


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name,label\n0.png,a", "no column 'file', but: name, label"),
        ("file,label\n", "lists no images"),
        ("file,label\n0.png,\n", "image 1 has no label"),
        ("file,label\n0.png,a\n0.png,b\n", "lists '0.png' twice"),
        ("file,label\n0.png,a\n7.png,b\n", "lists '7.png', and .* has no such file"),
        ("file,label,split\n0.png,a,train\n", "the entry cuts a holdout"),
        (b"file,label\n\xff\xfe.png,a\n", "cannot be read"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, text: str | bytes, why: str):
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises((DataError, SpecError), match=why):
        own(
            tmp_path,
            {"0.png": picture(0), "t.csv": data},
            folder=FolderForm(labels="t.csv"),
            holdout=0.5,
        ).manifest("test")


@pytest.mark.parametrize("label", ["-1", "1.0", " 1", "nan", "100000000000000000000"])
def test_numbers_that_are_no_labels(tmp_path: Path, label: str):
    files = {f"{i}.png": picture(i) for i in range(3)}
    files["t.csv"] = f"file,label\n0.png,0\n1.png,{label}\n2.png,1".encode()
    form = FolderForm(labels="t.csv")
    with pytest.raises(DataError, match=rf"t\.csv: '1\.png' has the label '{label}'"):
        own(tmp_path, files, folder=form, holdout=0.5).manifest("all")
    # Beside a name it is one.
    files["t.csv"] = f"file,label\n0.png,0\n1.png,{label}\n2.png,cat".encode()
    assert label in own(tmp_path, files, folder=form, holdout=0.5).class_names
    # The same in a table that labels the files of split folders.
    files = {"train/1.png": picture(1), "test/0.png": picture(0)}
    files["t.csv"] = f"file,label\n0.png,0\n1.png,{label}".encode()
    with pytest.raises(DataError, match=rf"t\.csv: '1\.png' has the label '{label}'"):
        own(tmp_path / "split", files, folder=form).manifest("train")


def test_ids_taken_for_labels(tmp_path: Path):
    files = {f"{i}.png": picture(i) for i in range(4)}
    lines = [f"{i}.png,{20210412000 + i // 2}" for i in range(4)]
    files["t.csv"] = "\n".join(["file,label", *lines]).encode()
    form = FolderForm(labels="t.csv")
    with pytest.raises(DataError, match=r"'own': 2 different labels .* largest is 20210412001"):
        own(tmp_path, files, folder=form, holdout=0.5).manifest("all")
    listed = ("20210412001", "20210412000")
    dataset = own(tmp_path, files, folder=form, holdout=0.5, classes=listed)
    assert dataset.manifest("all").labels.tolist() == [1, 1, 0, 0]


def test_images_that_a_table_leaves_out_are_named(tmp_path: Path):
    files = {"train/a.png": picture(0), "train/b.png": picture(1), "test/x/c.png": picture(2)}
    files["t.csv"] = b"file,label\na.png,x\n"
    dataset = own(tmp_path, files, folder=FolderForm(labels="t.csv"))
    with pytest.raises(DataError, match=r"1 of 2 images are not in .*t\.csv, the .* 'b\.png'"):
        dataset.manifest("train")


# Listings that are remembered


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every folder that is really listed; small listings are remembered too."""
    tops: list[Path] = []

    def counting(top: Path) -> Any:
        tops.append(top)
        return scan(top)

    monkeypatch.setattr("saebench.data.folder.scan", counting)
    monkeypatch.setattr("saebench.data.listings.WORTH", 1)
    return tops


def settle(root: Path) -> None:
    """As if nothing below had been changed for an hour."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - 3600,) * 2)


def test_a_listing_is_remembered(tmp_path: Path, listed: list[Path], store: Path):
    first = own(tmp_path, SMALL)
    settle(tmp_path / "own")
    expected = {split: rows_of(first, split) for split in ("train", "test")}
    assert len(listed) == 2
    again = open_dataset(OWN, Access(root=tmp_path))
    assert {split: rows_of(again, split) for split in ("train", "test")} == expected
    assert len(listed) == 2
    # A file added, or removed, anywhere below is seen.
    write(tmp_path / "own", {"train/cat/deep/er/new.png": picture(9)})
    assert len(open_dataset(OWN, Access(root=tmp_path)).manifest("train")) == 4
    settle(tmp_path / "own")
    (tmp_path / "own/train/dog/1.png").unlink()
    changed = open_dataset(OWN, Access(root=tmp_path))
    assert (len(changed.manifest("train")), changed.class_names) == (3, ("cat", "eel"))
    # A whole class too.
    settle(tmp_path / "own")
    write(tmp_path / "own", {"train/yak/1.png": picture(10)})
    assert len(open_dataset(OWN, Access(root=tmp_path)).manifest("train")) == 4


def test_a_folder_that_was_just_changed_is_listed_again(
    tmp_path: Path, listed: list[Path], store: Path
):
    """Within one tick of the clock a second change would not be seen."""
    own(tmp_path, SMALL).manifest("train")
    assert not list(store.glob("listings/*"))


@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_a_damaged_listing_is_made_anew(
    tmp_path: Path, listed: list[Path], store: Path, damage: str
):
    dataset = own(tmp_path, SMALL)
    settle(tmp_path / "own")
    expected = rows_of(dataset, "train")
    for path in store.glob("listings/*.npz"):
        data = bytearray(path.read_bytes())
        if damage == "cut":
            data = data[: len(data) // 2]
        elif damage == "flip":
            data[data.index(b"cat")] ^= 1
        else:
            data = bytearray(b"nothing")
        path.write_bytes(bytes(data))
    assert rows_of(open_dataset(OWN, Access(root=tmp_path)), "train") == expected
    assert len(listed) == 4
    assert rows_of(open_dataset(OWN, Access(root=tmp_path)), "train") == expected
    assert len(listed) == 4, "the new one is remembered"


def test_where_nothing_can_be_written_the_folder_is_listed_again(
    tmp_path: Path, listed: list[Path], store: Path
):
    store.write_text("a file where the store should be")
    expected = rows_of(own(tmp_path, SMALL), "train")
    settle(tmp_path / "own")
    assert rows_of(open_dataset(OWN, Access(root=tmp_path)), "train") == expected
    assert len(listed) > 2


# What else lies in folders


def test_what_is_no_image_is_skipped_and_counted(tmp_path: Path):
    junk = {
        "train/cat/Thumbs.db": b"x",
        "train/cat/._1.png": b"x",
        "train/cat/.DS_Store": b"x",
        "train/.ipynb_checkpoints/a.png": b"x",
        "train/__MACOSX/cat/1.png": b"x",
        "train/cat/notes.txt": b"x",
        "train/cat/LICENSE": b"x",
        "own.toml": b"x",
    }
    dataset: Any = own(tmp_path, {**SMALL, **junk})
    (tmp_path / "own" / "train" / "empty").mkdir()
    assert dataset.manifest("train").sha256 == own(tmp_path / "b", SMALL).manifest("train").sha256
    assert dataset.form.skipped["train"] == {".db": 1, ".txt": 1, "no suffix": 1}
    assert dataset.class_names == ("cat", "dog", "eel")


def test_links_are_followed(tmp_path: Path):
    dataset = own(tmp_path, SMALL)
    (tmp_path / "linked").mkdir()
    for split in ("train", "test"):
        (tmp_path / "linked" / split).symlink_to(tmp_path / "own" / split)
    linked = replace(OWN, folder=FolderForm(root=str(tmp_path / "linked")))
    assert open_dataset(linked).manifest("train").sha256 == dataset.manifest("train").sha256
    os.link(tmp_path / "own/train/cat/1.png", tmp_path / "own/train/dog/hard.png")
    (tmp_path / "own/train/dog/soft.png").symlink_to(tmp_path / "own/train/cat/1.png")
    assert len(open_dataset(OWN, Access(root=tmp_path)).manifest("train")) == 5
    (tmp_path / "own/train/dog/round").symlink_to(tmp_path / "own/train")
    with pytest.raises(DataError, match="round is a link to a folder it lies in"):
        open_dataset(OWN, Access(root=tmp_path)).manifest("train")


def test_what_is_not_there_is_said(tmp_path: Path):
    with pytest.raises(DataError, match="'own' is not there") as error:
        open_dataset(OWN)
    assert "<data root>/own: no --data-root, and SAEBENCH_DATA is not set" in str(error.value)
    with pytest.raises(DataError, match=r"own: there is no such folder"):
        open_dataset(OWN, Access(root=tmp_path))
    with pytest.raises(DataError, match=r"no train/ or test/ in it; there is: cats/, x\.txt"):
        own(tmp_path, {"cats/1.png": picture(0), "x.txt": b""})
    missing = own(tmp_path / "b", {"train/a/1.png": picture(0), "test_set/a/1.png": picture(1)})
    with pytest.raises(DataError, match="no split 'test'") as error:
        missing.manifest("test")
    assert "there is: test_set/, train/" in error.value.hint
    empty = own(tmp_path / "c", {"train/a/1.npy": b"", "test/a/1.png": picture(1)})
    with pytest.raises(DataError, match="split 'train' has no images") as error:
        empty.manifest("train")
    assert "1 .npy" in error.value.hint
    with pytest.raises(DataError, match=r"2 of 2 images are in no class folder, .* '1\.png'"):
        own(tmp_path / "d", {"train/1.png": b"", "train/2.png": b"", "test/a/1.png": b""}).manifest(
            "train"
        )
    with pytest.raises(DataError, match=r"no such table; there is: train/"):
        own(tmp_path / "e", {"train/a/1.png": b""}, folder=FolderForm(labels="l.csv"))


def test_split_folders_that_lie_elsewhere(tmp_path: Path):
    write(tmp_path / "far", {"a/train/x/1.png": picture(1), "b/test/x/1.png": picture(2)})
    far = {"train": str(tmp_path / "far/a/train"), "test": str(tmp_path / "far/b/test")}
    dataset = own(tmp_path, {"t.csv": b"file,label\n1.png,y"}, folder=FolderForm(splits=far))
    assert rows_of(dataset, "train") == {"train/x/1": (0, 1)}
    table = FolderForm(splits=far, labels="t.csv")
    labelled = f"file,label\n{far['train']}/x/1.png,y".encode()
    assert own(tmp_path, {"t.csv": labelled}, folder=table).class_names == ("x", "y")
    gone = FolderForm(splits={split: f"{path}/gone" for split, path in far.items()})
    with pytest.raises(DataError, match=rf"no {far['train']}/gone/ or {far['test']}/gone/ in it"):
        own(tmp_path, {}, folder=gone)


def test_the_datasets_own_folder_as_the_data_root(tmp_path: Path):
    own(tmp_path, SMALL)
    hub = replace(OWN, hub=HubForm(repo="someone/own"))  # which is then not asked
    for spec in (OWN, hub):
        with pytest.raises(DataError, match="own holds train/ itself") as error:
            open_dataset(spec, Access(root=tmp_path / "own"))
        assert error.value.hint == f"did you mean  --data-root {tmp_path}?"
    pool = replace(OWN, holdout=0.5, train="fit")
    (tmp_path / "b" / "own" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=rf"did you mean  --data-root {tmp_path / 'b'}\?"):
        open_dataset(pool, Access(root=tmp_path / "b" / "own"))
    (tmp_path / "own").rename(tmp_path / "other")
    with pytest.raises(DataError, match="other holds train/ itself: did you mean") as error:
        open_dataset(OWN, Access(root=tmp_path / "other"))
    assert f"ln -s other {tmp_path / 'own'}" in str(error.value)
    (tmp_path / "own").symlink_to("other")
    assert len(open_dataset(OWN, Access(root=tmp_path)).manifest("train")) == 3


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = own(tmp_path, SMALL)
    real = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cat/deep cannot be read: Permission denied"):
        dataset.manifest("train")


def test_a_name_that_is_not_utf8(tmp_path: Path):
    own(tmp_path, SMALL)
    path = os.fsencode(tmp_path / "own" / "train" / "cat") + b"/caf\xe9.png"
    with open(path, "wb") as file:
        file.write(picture(9))
    with pytest.raises(DataError, match=r"caf\\udce9\.png.* is not valid UTF-8"):
        open_dataset(OWN, Access(root=tmp_path)).manifest("train")


def test_ids_that_occur_twice(tmp_path: Path):
    files = {"train/a/1.png": picture(0), "train/b/1.png": picture(1), "test/a/1.png": picture(2)}
    with pytest.raises(DataError, match="1 ids occur more than once, the first is '1'"):
        own(tmp_path, files, id_pattern=r"([^/]+)\.png").manifest("train")
    write(tmp_path / "own", {"test/a/2.png": picture(3)})
    with pytest.raises(DataError, match="ids occur more than once, the first is 'train/a/1'"):
        own(tmp_path, {"train/a/1.jpg": picture(4)}).manifest("train")


def test_one_image_in_train_and_test(tmp_path: Path):
    files = {"train/a/1.png": picture(0), "test/a/1.png": picture(2)}
    own(tmp_path, files)
    spec = replace(OWN, id_pattern=r"([^/]+)\.png")
    with pytest.raises(DataError, match="1 images are in both 'train' and 'test'"):
        source_of(spec, RunConfig(data_root=str(tmp_path)))


def test_an_image_that_does_not_decode(tmp_path: Path):
    dataset = own(tmp_path, {**SMALL, "train/dog/2.png": b"<html>", "train/dog/3.png": b""})
    with pytest.raises(ImageError, match=r"'train/dog/2' of .*own/train/dog/2\.png: .*web page"):
        dataset.image("train", 3)
    (tmp_path / "own/train/dog/3.png").unlink()
    with pytest.raises(DataError, match=r"'train/dog/3' .* is gone: .*No such file") as error:
        dataset.image("train", 4)
    assert not isinstance(error.value, ImageError)


def test_a_disk_that_fails_is_not_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = own(tmp_path, SMALL)
    dataset.manifest("train")

    def read_bytes(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(DataError, match="Input/output error") as error:
        dataset.image("train", 0)
    assert not isinstance(error.value, ImageError)


# The page


PAGE = (CONTENT / "docs/datasets.md").read_text()


def test_the_five_lines_of_the_page(tmp_path: Path):
    section = PAGE.partition("## A folder of one's own\n")[2]
    entry, layout = re.findall(r"```(?:toml|text)\n(.*?)```", section, re.DOTALL)[:2]
    assert len(entry.splitlines()) == 5
    assert "mine/registry/datasets/birds.toml" in section
    names = layout.split()
    files = {f"mine/{name}": picture(i, "JPEG") for i, name in enumerate(names)}
    files["mine/registry/datasets/birds.toml"] = entry.encode()
    for i in range(8):
        files[f"mine/birds/robin/{i}.png"] = picture(i)
    write(tmp_path, files)
    spec = Registry.load((str(tmp_path / "mine"),)).dataset("birds")
    dataset = open_dataset(spec)
    assert dataset.class_names == ("great_tit", "robin")
    assert "robin/2021/a" in dataset.manifest("all").ids
    assert (len(dataset.manifest("test")), len(dataset.manifest("train"))) == (2, 8)
    assert dataset.text_names["default"] == ("great tit", "robin")
    assert len(dataset.templates) == 7


@pytest.mark.parametrize("entry", re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL))
def test_every_entry_of_the_page_is_one(entry: str):
    raw = tomllib.loads(entry)
    parse_spec(DatasetSpec, {"source": "images", **raw}, name="page", path="docs/datasets.md")
