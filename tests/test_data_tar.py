"""Tar shards: the true layouts, what is damaged, and the same manifest as the folder's."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from saebench.data import Access, Dataset, open_dataset
from saebench.data.imagenet import wnids
from saebench.data.tar import expand, shards_of
from saebench.data.tarindex import members
from saebench.errors import DataError, SpecError
from saebench.specs import DatasetSpec, FolderForm, TarForm
from tests.image_collections import imagenet_files, number_of, picture, write, write_tar
from tests.test_data_folder import IMAGENET, SMALL, rows_of

OWN = DatasetSpec(name="own", source="images", tar=TarForm())
TIMM = TarForm(
    splits={"train": "imagenet1k-train-{0000..0002}.tar", "val": "imagenet1k-validation-*.tar"}
)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def own(root: Path, samples: Mapping[str, bytes], **changes: Any) -> Dataset:
    """A dataset of one's own: `train.tar` of these members, and `test.tar` of one sample."""
    write_tar(root / "own" / "train.tar", samples)
    write_tar(root / "own" / "test.tar", {"z.png": picture(99), "z.cls": b"0", "z.json": b"{}"})
    return open_dataset(replace(OWN, **changes), Access(root=root))


def timm_shards(root: Path) -> None:
    """As `timm/imagenet-1k-wds` has them: flat keys, .cls and .json beside .jpg."""
    shards: dict[str, dict[str, bytes]] = {}
    for number, (name, data) in enumerate(imagenet_files().items()):
        split, wnid, file = name.split("/")
        stem, label = file.removesuffix(".JPEG"), wnids().index(wnid)
        about = {"label": label, "filename": f"{wnid}/{file}", "width": 8, "height": 6}
        called = "train" if split == "train" else "validation"
        shard = shards.setdefault(f"imagenet1k-{called}-{number % 3:04d}.tar", {})
        shard[f"{stem}.cls"] = str(label).encode()
        shard[f"{stem}.jpg"] = data
        shard[f"{stem}.json"] = json.dumps(about).encode()
    for name, files in shards.items():
        write_tar(root / name, files)


# The same dataset in every form


def test_imagenet_in_timms_shards_is_the_folder(tmp_path: Path):
    write(tmp_path / "a" / "imagenet-1k", imagenet_files())
    timm_shards(tmp_path / "b" / "imagenet-1k")
    folder = open_dataset(IMAGENET, Access(root=tmp_path / "a"))
    both = replace(IMAGENET, folder=FolderForm(), tar=TIMM)
    tar = open_dataset(both, Access(root=tmp_path / "b"))
    by_json = open_dataset(
        replace(both, tar=replace(TIMM, label="json:label")), Access(root=tmp_path / "b")
    )
    for split in ("train", "val"):
        assert folder.manifest(split).sha256 == tar.manifest(split).sha256
        assert tar.manifest(split).sha256 == by_json.manifest(split).sha256
        assert rows_of(folder, split) == rows_of(tar, split) == rows_of(by_json, split)


@pytest.mark.parametrize("top", ["", "./", "train/", "./train/", "Train_Set/"])
def test_a_packed_folder_is_the_folder(tmp_path: Path, top: str):
    files = {name.removeprefix("train/"): data for name, data in SMALL.items() if "train" in name}
    folder = open_dataset(
        replace(OWN, tar=None, folder=FolderForm()), Access(root=write_own(tmp_path / "a"))
    )
    packed = {f"{top}{name}": data for name, data in files.items()}
    packed |= {f"{top}cat/._1.png": b"x", f"{top}cat/notes.txt": b"x"}
    write_tar(tmp_path / "b" / "own" / "Train_Set.tar", packed)
    rest = {name.removeprefix("test/"): data for name, data in SMALL.items() if "test" in name}
    write_tar(tmp_path / "b" / "own" / "test.tar", rest)
    form = TarForm(label="folder", splits={"train": "Train_Set.tar", "test": "test.tar"})
    tar = open_dataset(replace(OWN, tar=form), Access(root=tmp_path / "b"))
    assert tar.class_names == folder.class_names == ("cat", "dog", "eel")
    for split in ("train", "test"):
        assert tar.manifest(split).sha256 == folder.manifest(split).sha256
        assert rows_of(tar, split) == rows_of(folder, split)


def test_folders_called_by_numbers_are_numbered_as_in_the_folder(tmp_path: Path):
    files = {
        f"{s}/{c}/{i}.png": picture(i) for s in ("train", "test") for c in "125" for i in (0, 1)
    }
    write(tmp_path / "own", files)
    for split in ("train", "test"):
        with tarfile.open(tmp_path / "own" / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / "own" / split, split)
    folder = open_dataset(replace(OWN, tar=None), Access(root=tmp_path))
    tar = open_dataset(replace(OWN, tar=TarForm(label="folder")), Access(root=tmp_path))
    assert tar.class_names == folder.class_names == ("1", "2", "5")
    for split in ("train", "test"):
        assert tar.manifest(split).labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert tar.manifest(split).sha256 == folder.manifest(split).sha256


def write_own(root: Path) -> Path:
    write(root / "own", SMALL)
    return root


def test_one_pool_with_a_holdout(tmp_path: Path):
    files = {f"{c}/{i}.png": picture(i) for c in "ab" for i in range(6)}
    write(tmp_path / "a" / "own", files)
    write_tar(tmp_path / "b" / "own" / "x.tar", files)
    spec = replace(OWN, holdout=0.5, tar=TarForm(label="folder"), folder=FolderForm())
    tar = open_dataset(replace(spec, folder=None), Access(root=tmp_path / "b"))
    folder = open_dataset(replace(spec, tar=None), Access(root=tmp_path / "a"))
    for split in ("train", "test", "all"):
        assert tar.manifest(split).sha256 == folder.manifest(split).sha256


def test_one_pool_that_was_packed_as_a_whole(tmp_path: Path):
    """`tar cf birds.tar birds`."""
    files = {f"{c}/{i}.png": picture(i) for c in ("robin", "tit") for i in range(6)}
    write(tmp_path / "a" / "birds", files)
    (tmp_path / "b" / "own").mkdir(parents=True)
    with tarfile.open(tmp_path / "b" / "own" / "birds.tar", "w") as tar:
        tar.add(tmp_path / "a" / "birds", "birds")
    root = str(tmp_path / "a" / "birds")
    folder = open_dataset(replace(OWN, holdout=0.5, tar=None, folder=FolderForm(root=root)))
    spec = replace(OWN, holdout=0.5, tar=TarForm(label="folder"))
    tar = open_dataset(spec, Access(root=tmp_path / "b"))
    assert tar.class_names == ("robin", "tit")
    for split in ("train", "test", "all"):
        assert tar.manifest(split).sha256 == folder.manifest(split).sha256
        assert rows_of(tar, split) == rows_of(folder, split)
    # Of another name, nothing tells that it is no class.
    (tmp_path / "b" / "own" / "birds.tar").rename(tmp_path / "b" / "own" / "x.tar")
    with pytest.raises(
        DataError, match=r"the folder 'birds', as 'birds/robin/0\.png', and"
    ) as error:
        open_dataset(spec, Access(root=tmp_path / "b")).manifest("train")
    assert "birds.tar" in error.value.hint


def test_a_shard_for_each_class(tmp_path: Path):
    for name in ("robin", "tit"):
        files = {f"{name}/1.png": picture(1), f"{name}/2021/2.png": picture(2)}
        write_tar(tmp_path / "own" / f"{name}.tar", files)
    spec = replace(OWN, holdout=0.5, tar=TarForm(label="folder"))
    dataset = open_dataset(spec, Access(root=tmp_path))
    assert dataset.class_names == ("robin", "tit")
    assert set(dataset.manifest("all").ids) == {
        f"{name}/{below}" for name in ("robin", "tit") for below in ("1", "2021/2")
    }


def test_hard_links_are_images_and_symbolic_ones_an_error(tmp_path: Path):
    """One image of two classes: `tar` writes it once."""
    pack = tmp_path / "pack"
    write(
        pack, {f"{s}/{c}/1.png": picture(i) for i, c in enumerate("ab") for s in ("train", "test")}
    )
    os.link(pack / "train/a/1.png", pack / "train/b/again.png")

    def packed(root: Path) -> Dataset:
        (root / "own").mkdir(parents=True)
        for split in ("train", "test"):
            with tarfile.open(root / "own" / f"{split}.tar", "w") as tar:
                tar.add(pack / split, split)
        return open_dataset(replace(OWN, tar=TarForm(label="folder")), Access(root=root))

    assert rows_of(packed(tmp_path / "a"), "train") == {
        "train/a/1": (0, 0), "train/b/1": (1, 1), "train/b/again": (1, 0),
    }  # fmt: skip
    (pack / "train/a/.hidden").symlink_to("1.png")
    (pack / "train/a/notes.txt").symlink_to("1.png")
    assert len(packed(tmp_path / "b").manifest("train")) == 3
    for number, (name, target) in enumerate((("a/soft.png", "1.png"), ("c", "a"))):
        (pack / "train" / name).symlink_to(target)
        with pytest.raises(DataError, match=rf"train/{name}' is a link to '{target}'") as error:
            packed(tmp_path / str(number)).manifest("train")
        assert "tar -h" in error.value.hint
        (pack / "train" / name).unlink()


def test_a_hard_link_to_what_is_not_there(tmp_path: Path):
    path = write_tar(tmp_path / "own" / "train.tar", {"a/1.png": picture(1)})
    write_tar(tmp_path / "own" / "test.tar", {"b/1.png": picture(1)})
    with tarfile.open(path, "a") as tar:
        for name, target in (("a/2.png", "a/3.png"), ("a/3.png", "a/2.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            tar.addfile(link)
    dataset = open_dataset(replace(OWN, tar=TarForm(label="folder")), Access(root=tmp_path))
    with pytest.raises(DataError, match=r"'a/2\.png' is a link to"):
        dataset.manifest("train")


def test_a_root_with_brackets_in_its_name(tmp_path: Path):
    samples = {"a.png": picture(1), "a.cls": b"3"}
    dataset = own(tmp_path / "data [2024] {a,b}*", samples)
    assert rows_of(dataset, "train") == {"train/a": (3, 1)}


@pytest.mark.parametrize("label", ["-1", "1.0", "20210412000000000000"])
def test_numbers_that_are_no_labels(tmp_path: Path, label: str):
    samples = {"a.png": picture(1), "a.cls": b"0", "b.png": picture(2), "b.cls": label.encode()}
    with pytest.raises(DataError, match=rf"train.*\.tar: 'b\.png' has the label '{label}'"):
        own(tmp_path, samples).manifest("train")


def test_labels_may_be_names(tmp_path: Path):
    samples = {"a.png": picture(1), "a.cls": b"dog\n", "b.png": picture(2), "b.cls": b"cat"}
    write_tar(tmp_path / "own" / "train-0.tar", samples)
    write_tar(tmp_path / "own" / "test-0.tar", {"c.webp": picture(3), "c.cls": b"dog"})
    dataset = open_dataset(OWN, Access(root=tmp_path))
    assert dataset.class_names == ("cat", "dog")
    assert rows_of(dataset, "train") == {"train/a": (1, 1), "train/b": (0, 2)}
    assert rows_of(dataset, "test") == {"test/c": (1, 3)}


def test_samples_are_alike_up_to_the_first_dot(tmp_path: Path):
    """WebDataset's rule; a mask or a second view is a field of another name."""
    samples = {"x.y/1.png": picture(1), "x.y/1.seg.png": b"mask", "x.y/1.CLS": b"3"}
    dataset = own(tmp_path, samples)
    assert rows_of(dataset, "train") == {"train/x.y/1": (3, 1)}


# Reading


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_tarfiles(tmp_path: Path, format: int):
    files = {f"{'d' * i}/{i}.png": os.urandom(i * 97) for i in (0, 1, 5, 6, 90, 99)}
    files["0.txt"] = b""
    long = {f"{'folder/' * 20}{'n' * 60}é.png": b"x" * 513, f"{'m' * 300}.png": b"y"}
    if format == tarfile.USTAR_FORMAT:
        long = {f"{'folder/' * 20}{'n' * 60}.png": b"x" * 513}  # by its prefix field
    path = write_tar(tmp_path / "x.tar", {**files, **long}, format)
    with tarfile.open(path, "a", format=format) as tar:
        tar.add(tmp_path, "a_folder.png", recursive=False)
        targets = [*files, *long, "hard-0.png"]  # the last one is a link itself
        if format == tarfile.USTAR_FORMAT:
            targets = [target for target in targets if len(target) <= 100]
        for number, target in enumerate(targets):
            link = tarfile.TarInfo(f"hard-{number}.png")
            link.type, link.linkname = tarfile.LNKTYPE, target
            tar.addfile(link)
    with tarfile.open(path) as tar:
        there = {one.name: one for one in tar.getmembers() if one.isfile()}
        expected = [(one.name, one.offset_data, one.size) for one in there.values()]
        for number, target in enumerate(targets):
            one = there[target if target in there else targets[0]]
            expected.append((f"hard-{number}.png", one.offset_data, one.size))
        found = list(members(path))
        assert [(one.name, one.offset, one.size) for one in found] == expected
        for one in found:
            data = path.read_bytes()[one.offset : one.offset + one.size]
            content: Any = tar.extractfile(one.name)
            assert data == content.read()
            assert one.start == data[:512]


def test_images_are_read_in_other_processes(tmp_path: Path):
    dataset = own(tmp_path, {f"{i}.{s}": d for i in range(5) for s, d in
                             (("png", picture(i)), ("cls", b"1"))})  # fmt: skip
    expected = rows_of(dataset, "train")
    assert rows_of(pickle.loads(pickle.dumps(dataset)), "train") == expected
    with get_context("fork").Pool(2) as pool:
        numbers = pool.starmap(_number, [(dataset, row) for row in range(5)] * 3)
    assert numbers == [number for _, number in expected.values()] * 3


def _number(dataset: Dataset, row: int) -> int:
    return number_of(dataset.image("train", row))


def test_an_index_is_remembered(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("saebench.data.listings.WORTH", 1)
    samples = {"a.png": picture(1), "a.cls": b"dog", "b.png": picture(2), "b.cls": b"cat"}
    write_tar(tmp_path / "own" / "test.tar", {"z.png": picture(99), "z.cls": b"cow"})
    write_tar(tmp_path / "own" / "train.tar", samples)
    dataset = open_dataset(OWN, Access(root=tmp_path))
    old = time.time() - 3600
    for path in (tmp_path / "own").iterdir():
        os.utime(path, (old, old))
    expected, names = rows_of(dataset, "train"), dataset.class_names
    with monkeypatch.context() as patch:
        patch.setattr("saebench.data.tarrows.members", lambda path: pytest.fail("it is read again"))
        again = open_dataset(OWN, Access(root=tmp_path))
        assert rows_of(again, "train") == expected
        assert again.class_names == names
    # Another shard of the same name and time: its size tells.
    other = {"c.png": picture(3) + b"." * 20_000, "c.cls": b"cow"}
    write_tar(tmp_path / "own" / "train.tar", other)
    os.utime(tmp_path / "own" / "train.tar", (old, old))
    assert list(rows_of(open_dataset(OWN, Access(root=tmp_path)), "train")) == ["train/c"]


# Shards


def test_patterns_are_webdatasets():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{8..10}") == ["8", "9", "10"]
    assert expand("{x,y}-{0..1}*") == ["x-0*", "x-1*", "y-0*", "y-1*"]
    assert expand("plain-*.tar") == ["plain-*.tar"]
    assert expand("{odd}.tar") == ["{odd}.tar"]
    assert len(expand("imagenet1k-train-{0000..1023}.tar")) == 1024


def test_shards_that_are_missing_are_named(tmp_path: Path):
    timm_shards(tmp_path / "imagenet-1k")
    spec = replace(IMAGENET, folder=None, tar=TIMM)
    (tmp_path / "imagenet-1k" / "imagenet1k-train-0001.tar").unlink()
    with pytest.raises(DataError, match=r"1 of the 3 shards .* is .*train-0001\.tar") as error:
        open_dataset(spec, Access(root=tmp_path))
    assert "*" in error.value.hint
    part = replace(TIMM, splits={**TIMM.splits, "train": "imagenet1k-train-*.tar"})
    dataset = open_dataset(replace(spec, tar=part), Access(root=tmp_path))
    assert 0 < len(dataset.manifest("train")) < 12
    (tmp_path / "b" / "imagenet-1k").mkdir(parents=True)
    with pytest.raises(DataError, match=r"\[tar\] .*: no imagenet1k.* in it; there is: nothing"):
        open_dataset(spec, Access(root=tmp_path / "b"))
    assert shards_of(tmp_path / "imagenet-1k", "{no,nor}-*.tar") == []


def test_every_place_looked_at_is_named(tmp_path: Path):
    (tmp_path / "own" / "cats").mkdir(parents=True)
    with pytest.raises(DataError, match="'own' is not there") as error:
        open_dataset(replace(OWN, folder=FolderForm()), Access(root=tmp_path))
    text = str(error.value)
    assert "[folder]" in text
    assert "no train/ or test/ in it; there is: cats/" in text
    assert "no train-*.tar or test-*.tar in it" in text
    assert "--data-root" in text


# What is damaged


def good() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in {"a.png": picture(1) * 30, "a.cls": b"1", "b.png": picture(2)}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (good()[:1000], r"truncated: it ends within 'a\.png'"),
        (good()[: good().rindex(picture(2))], "truncated"),
        (good().rstrip(b"\0") + bytes(100), "truncated"),
        (good()[: good().rindex(picture(2)) + 512], "truncated: it has no end mark"),
        (good()[:500], "is not a tar file"),
        (b"", "is empty"),
        (gzip.compress(good()), "compressed with gzip, and single images cannot be read"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
        (b"<html>" * 200, "is not a tar file"),
        (good()[:512] + b"!" + good()[512:], "is damaged at byte"),
    ],
)
def test_tars_that_cannot_be_read(tmp_path: Path, data: bytes, why: str):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match=why) as error:
        list(members(path))
    assert str(path) in error.value.what


@pytest.mark.parametrize(
    ("samples", "label", "why"),
    [
        ({"a.png": b"x"}, "cls", r"'a\.png' has no label \(members: png\)"),
        ({"a.cls": b"1"}, "cls", r"'a\.cls' has no images \(members: cls\)"),
        ({"a.png": b"", "a.jpg": b"", "a.cls": b"1"}, "cls", "has 2 images"),
        ({"a.png": b"", "a.cls": b" "}, "cls", r"'a\.cls' holds no label"),
        ({"a.png": b"", "a.cls": b"\xff"}, "cls", r"'a\.cls' holds no label"),
        ({"a.png": b"", "a.json": b"{}"}, "json:label", "holds no label: KeyError"),
        ({"a.png": b"", "a.json": b'{"label": 0.5}'}, "json:label", "label is 0.5"),
        ({"a.png": b"", "a.json": b"{"}, "json:label", "holds no label"),
        ({"a.png": b"x"}, "folder", "it lies in no folder"),
    ],
)
def test_samples_that_are_none(tmp_path: Path, samples: dict, label: str, why: str):
    dataset = own(tmp_path, samples, tar=TarForm(label=label))
    with pytest.raises(DataError, match=why):
        dataset.manifest("train")


def test_a_long_json_is_read_whole(tmp_path: Path):
    about = {"caption": "x" * 5000, "label": 7}
    samples = {"a.png": picture(1), "a.json": json.dumps(about).encode()}
    write_tar(tmp_path / "own" / "train.tar", samples)
    write_tar(tmp_path / "own" / "test.tar", samples)
    spec = replace(OWN, tar=TarForm(label="json:label"), id_pattern=r"(\w+)\.png")
    dataset = open_dataset(spec, Access(root=tmp_path))
    assert rows_of(dataset, "train") == {"a": (7, 1)}


def test_keys_that_occur_twice(tmp_path: Path):
    sample = [("a.png", picture(1)), ("a.cls", b"1")]
    with pytest.raises(DataError, match=r"train\.tar holds 'a\.png' twice"):
        own(tmp_path, [*sample, *sample]).manifest("train")  # type: ignore[arg-type]
    for shard in ("train-0.tar", "train-1.tar"):
        write_tar(tmp_path / "b" / "own" / shard, sample)
    write_tar(tmp_path / "b" / "own" / "test-0.tar", sample)
    with pytest.raises(DataError, match="ids occur more than once, the first is 'train/a'"):
        open_dataset(OWN, Access(root=tmp_path / "b")).manifest("train")


def test_a_bad_image_is_named_with_its_shard(tmp_path: Path):
    dataset = own(tmp_path, {"a.png": b"<html>", "a.cls": b"1"})
    with pytest.raises(DataError, match=r"'train/a' .*train\.tar, bytes 512 to 518: .*web page"):
        dataset.image("train", 0)


def test_what_a_label_may_be(tmp_path: Path):
    with pytest.raises(SpecError, match=r"\[tar\] label is 'class'"):
        own(tmp_path, {}, tar=TarForm(label="class"))
