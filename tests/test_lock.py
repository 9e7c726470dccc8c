"""The lock file: what came first stays, two processes lose nothing, damage is said."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saebench import lock
from saebench.errors import WeightsError, WriteError
from saebench.lock import Asked, Locked

A = Asked("model", "timm/vit", file="model.safetensors")
ONE = Locked("1" * 40, "model.safetensors", "a" * 64, 10, "2026-01-01T00:00:00Z")
TWO = Locked("2" * 40, "model.safetensors", "b" * 64, 20, "2026-01-02T00:00:00Z")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAEBENCH_LOCK", str(tmp_path / "below" / "my.lock"))
    return tmp_path / "below" / "my.lock"


def test_nothing_is_locked_at_first_and_reading_writes_nothing(path: Path) -> None:
    assert lock.find(A) is None
    assert lock.everything() == {}
    assert not path.parent.exists()


def test_what_came_first_holds(path: Path) -> None:
    assert lock.keep(A, ONE) == ONE
    assert lock.keep(A, TWO) == ONE
    assert lock.find(A) == ONE


def test_the_file_can_be_read_by_a_person(path: Path) -> None:
    lock.keep(A, ONE)
    lock.keep(Asked("dataset", "a/d", "main"), Locked("3" * 40))
    content = json.loads(path.read_text())
    assert content["version"] == 1
    assert [line["asked"]["repo"] for line in content["files"]] == ["a/d", "timm/vit"]
    assert content["files"][1] == {
        "asked": {"kind": "model", "repo": "timm/vit", "revision": "", "file": "model.safetensors"},
        "found": {
            "commit": "1" * 40,
            "file": "model.safetensors",
            "sha256": "a" * 64,
            "bytes": 10,
            "when": "2026-01-01T00:00:00Z",
        },
    }


def test_one_commit_for_all_that_is_asked_of_a_repository_at_a_revision(path: Path) -> None:
    lock.keep(A, ONE)
    assert lock.commit_of(Asked("model", "timm/vit", file="config.json")) == ONE.commit
    assert lock.commit_of(Asked("model", "timm/vit", "v2", "config.json")) == ""
    assert lock.commit_of(Asked("dataset", "timm/vit", file="config.json")) == ""


def test_an_update_knows_nothing_and_replaces_in_one_write(path: Path) -> None:
    other, config = Asked("model", "timm/other", file="x"), replace(A, file="config.json")
    tagged = replace(A, revision="v1")
    for asked in (A, other, config, tagged):
        lock.keep(asked, ONE)
    with lock.updating() as update:
        assert lock.everything() == {}
        assert lock.find(A) is None
        assert lock.commit_of(A) == ""
        assert lock.keep(A, TWO) == lock.find(A) == TWO
        assert update.outdated() == {config: ONE}  # of one commit with A; not so the other two
        assert TWO.commit not in path.read_text()
    assert lock.everything() == {A: TWO, other: ONE, tagged: ONE}


def test_an_update_that_comes_to_the_same_commit_keeps_its_other_files(path: Path) -> None:
    config = replace(A, file="config.json")
    lock.keep(A, ONE)
    lock.keep(config, ONE)
    with lock.updating():
        lock.keep(A, ONE)
    assert lock.everything() == {A: ONE, config: ONE}


@pytest.mark.parametrize("end", [KeyboardInterrupt, WeightsError("no")])
def test_what_ends_an_update_leaves_the_lock_as_it_was(end: Any, path: Path) -> None:
    lock.keep(A, ONE)
    before = path.read_bytes()

    def update() -> None:
        with lock.updating():
            lock.keep(A, TWO)
            raise end

    with pytest.raises((KeyboardInterrupt, WeightsError)):
        update()
    assert path.read_bytes() == before
    assert lock.find(A) == ONE


def test_it_lies_in_the_users_folder_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAEBENCH_LOCK", raising=False)
    monkeypatch.setenv("SAEBENCH_CONFIG", str(tmp_path / "config"))
    assert lock.lock_path() == tmp_path / "config" / "saebench.lock"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 2, "files": []}',
        '{"version": 1, "files": [{"asked": {"repo": "a/b"}, "found": {}}]}',
        '{"version": 1, "files": [{"asked": {"kind": "x", "repo": "a"}, "found": {"commit": ""}}]}',
    ],
)
def test_a_damaged_file_is_never_taken_for_an_empty_one(text: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(text)
    for act in (lambda: lock.find(A), lambda: lock.keep(A, ONE)):
        with pytest.raises(WeightsError, match=r"(?s)my\.lock cannot be read.*restore it.*remove"):
            act()
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written(path: Path) -> None:
    path.parent.write_text("a file, where a folder should be")
    with pytest.raises(WriteError, match=r"(?s)cannot be written.*SAEBENCH_LOCK=FILE"):
        lock.keep(A, ONE)
    with pytest.raises(WriteError), lock.updating():  # before anything is asked
        raise AssertionError


def test_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    code = (
        "import sys\n"
        "from saebench import lock\n"
        "for i in range(20):\n"
        "    asked = lock.Asked('model', f'me/{sys.argv[1]}-{i}')\n"
        "    lock.keep(asked, lock.Locked('1' * 40))\n"
        "    lock.keep(lock.Asked('model', 'me/both'), lock.Locked(sys.argv[1] * 40))\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    found = lock.everything()
    names = {f"me/{name}-{i}" for name in "abc" for i in range(20)}
    assert {asked.repo for asked in found} == names | {"me/both"}
    assert len({asked for asked in found if asked.repo == "me/both"}) == 1
