"""Listings: folders that links lead round in circles, and remembered listings that are damaged."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from saebench.data import listings
from saebench.data.listings import Listed, remembered, stamp_of
from saebench.data.scan import scan
from saebench.data.texts import Texts
from saebench.errors import DataError

NAMES = Texts.of([f"{i}.png" for i in range(60)]).data
ARRAYS = {"names": NAMES, "folder_of": np.zeros(6000, np.int32)}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a listing that was remembered."""
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(listings, "WORTH", 1)
    monkeypatch.setattr(listings, "SETTLED", -1e9)  # whatever was just made
    assert ask() is True
    assert ask() is False
    (path,) = (tmp_path / "store" / "listings").iterdir()
    return path


def ask() -> bool:
    """Whether it had to be listed. What comes is right in any case."""
    made = []

    def make() -> Listed:
        made.append(True)
        return Listed(ARRAYS, {"/": stamp_of("/")}, 60)

    found = remembered({"of": "a test"}, make)
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in ARRAYS.items()
    }
    return bool(made)


def packed(path: Path, **changes: np.ndarray | None) -> bytes:
    """The file with some arrays replaced or, with None, left out; its checksums are right."""
    with np.load(path) as file:
        arrays = {**file, **changes}
    data = io.BytesIO()
    np.savez(data, **{name: array for name, array in arrays.items() if array is not None})
    return data.getvalue()


def test_arrays_that_are_missing_cut_or_of_others_are_made_anew(kept: Path):
    damaged = [packed(kept, **{name: None}) for name in (*ARRAYS, "_about", "_watched", "_stamps")]
    damaged += [
        packed(kept, names=NAMES[:-7]),
        packed(kept, folder_of=np.zeros(6000, np.int64)),
        packed(kept, more=NAMES),
        packed(kept, _about=np.frombuffer(b"[]", np.uint8)),
    ]
    for data in damaged:
        kept.write_bytes(data)
        assert ask() is True
        assert ask() is False, "the new one is remembered"


def test_an_array_that_says_it_is_smaller_is_not_believed(kept: Path):
    """Its checksum is never compared: zipfile does so once all is read."""
    data = kept.read_bytes()
    assert data.count(b"(6000,)") == 1
    kept.write_bytes(data.replace(b"(6000,)", b"(2000,)"))
    assert ask() is True


def test_whatever_is_damaged_is_made_anew(kept: Path):
    """Flags that say encrypted, unknown methods of compression, lengths that are nowhere."""
    whole, rng = kept.read_bytes(), random.Random(0)
    start = whole.rindex(b"PK\x01\x02")
    headers = [i for i in range(len(whole)) if whole[i : i + 4] in (b"PK\3\4", b"PK\1\2")]
    assert start in headers
    places = [place for at in headers for place in range(at, at + 46)]
    places += [rng.randrange(len(whole)) for _ in range(200)]
    with zipfile.ZipFile(kept) as file:
        assert len(file.namelist()) == len(ARRAYS) + 3
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        kept.write_bytes(bytes(data))
        ask()


# Links


def files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_a_folder_that_is_linked_from_several_is_listed_in_each(tmp_path: Path):
    files(tmp_path, "top/a/1.png", "top/b/2.png", "shared/deep/3.png")
    for name in ("a", "b"):
        (tmp_path / "top" / name / "more").symlink_to("../../shared")
    (tmp_path / "top/b/a").symlink_to("../a")
    assert scan(tmp_path / "top").folders == {
        "a": ["1.png"],
        "a/more/deep": ["3.png"],
        "b": ["2.png"],
        "b/a": ["1.png"],
        "b/a/more/deep": ["3.png"],
        "b/more/deep": ["3.png"],
    }


SEVEN = "abcdefg"


@pytest.mark.parametrize(
    ("links", "first"),
    [
        ({"a/l": "../b", "b/l": "../a"}, "[ab]/l/l"),
        ({"a/l": "../b", "b/l": "../c", "c/l": "../a"}, "[abc]/l/l/l"),
        ({"a/x/l": "../../b/y", "b/y/l": "../../a"}, "(a/x/l/l|b/y/l/x/l)"),
        ({"a/l": ".."}, "a/l"),
        ({"a/l": "."}, "a/l"),
        ({"a/l": "../.."}, "a/l"),
        (
            {f"{a}/{b}": f"../{b}" for a in "abcdefgh" for b in "abcdefgh" if a != b},
            "[a-h](/[a-h])+",
        ),
    ],
)
def test_links_in_a_circle_are_named(tmp_path: Path, links: dict[str, str], first: str):
    top = tmp_path / "top"
    for link, target in links.items():
        files(top, f"{link[0]}/1.png")
        (top / link).parent.mkdir(exist_ok=True, parents=True)
        (top / link).symlink_to(target)
    with pytest.raises(DataError, match=rf"top/{first} is a link to a folder it lies in"):
        scan(top)


def test_a_link_to_itself_is_named(tmp_path: Path):
    files(tmp_path, "a/1.png")
    (tmp_path / "a/l").symlink_to("l")
    with pytest.raises(DataError, match=r"a/l cannot be read: Too many levels") as error:
        scan(tmp_path)
    assert "link" in error.value.hint
