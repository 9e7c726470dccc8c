"""Atomic writes and canonical hashes."""

from __future__ import annotations

import hashlib
import math
import os
import time
from pathlib import Path

import pytest

from saebench.atomic import remove_leftovers, replacing, write_bytes, write_files
from saebench.errors import WriteError
from saebench.identity import canonical_json, content_hash


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert temporary.parent == tmp_path
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_bytes(b"half of" * (1 // (temporary.write_bytes(b"half") - 4)))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_several_files_appear_in_order_and_only_once_all_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[str] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        assert len(list(tmp_path.glob(".*.tmp"))) + len(placed) == 3
        placed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_files({tmp_path / name: name.encode() for name in ("c", "a", "b")})
    assert placed == ["c", "a", "b"]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"a", "b": b"b", "c": b"c"}


def test_files_get_the_permissions_that_the_user_asked_for(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_what_killed_writers_leave_is_removed_after_a_day(tmp_path: Path) -> None:
    (tmp_path / ".a.1-x.tmp").write_bytes(b"")
    (tmp_path / ".b.1-x.tmp").mkdir()
    (tmp_path / "kept").write_bytes(b"")
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    yesterday = time.time() - 90_000
    for path in tmp_path.iterdir():
        os.utime(path, (yesterday, yesterday))
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_an_error_says_what_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match="part of that path is a file"):
        write_bytes(tmp_path / "file" / "a", b"")
    with pytest.raises(WriteError, match="not there"):
        write_bytes(tmp_path / "nowhere" / "a", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match="folder of that name"):
        write_bytes(tmp_path / "folder", b"")


def test_canonical_json_is_one_text() -> None:
    assert canonical_json({"b": (1, 2.5, None), "a": {"ü": True}}) == (
        '{"a":{"\\u00fc":true},"b":[1,2.5,null]}'
    )
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    assert canonical_json(1) != canonical_json(1.0)
    assert content_hash([]) == hashlib.sha256(b"[]").hexdigest()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_has_no_identity(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        content_hash({"a": value})


def test_only_plain_values_have_an_identity() -> None:
    with pytest.raises(TypeError):
        content_hash({"a": Path("a")})
