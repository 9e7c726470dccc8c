"""A disk that is full, a folder that cannot be written: an error that says so, and nothing lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from saebench.errors import ResultsError, WriteError
from saebench.results import ResultsFolder
from saebench.segments import SegmentStore
from saebench.store import Store
from tests.results_rows import unit

A, B = "a" * 32, "b" * 32

FAILURES = {errno.ENOSPC: "free some space", errno.EROFS: "read-only", errno.EACCES: "may write to"}
failures = pytest.mark.parametrize("number", FAILURES, ids=lambda number: errno.errorcode[number])
STEPS = [(Path, "write_bytes"), (os, "fsync"), (os, "replace")]
steps = pytest.mark.parametrize("step", STEPS, ids=lambda step: step[1])


def failing(number: int) -> Callable[..., Any]:
    """What fails like a system call."""

    def fail(*arguments: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@failures
@steps
def test_a_unit_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: tuple[Any, str]
) -> None:
    folder = ResultsFolder(tmp_path / "results", create=True)
    folder.write_unit(A, {}, unit(A))
    folder.merge()
    with monkeypatch.context() as patch:
        patch.setattr(*step, failing(number))
        with pytest.raises(WriteError, match=FAILURES[number]):
            folder.write_unit(B, {}, unit(B), {"latent": np.arange(2)})
        with pytest.raises(WriteError, match=FAILURES[number]):
            folder.write_error(B, {}, ValueError("no"))
        folder.merge()  # nothing is new, so nothing is written
    assert folder.has(A)
    assert not folder.has(B)
    assert list(folder.out.rglob("*.tmp")) == []
    assert pd.read_parquet(folder.out)["unit_id"].unique().tolist() == [A]


@steps
def test_a_merge_that_cannot_be_written_leaves_the_old_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str]
) -> None:
    folder = ResultsFolder(tmp_path / "results", create=True)
    folder.write_unit(A, {}, unit(A))
    folder.merge()
    folder.write_unit(B, {}, unit(B))
    with monkeypatch.context() as patch:
        patch.setattr(*step, failing(errno.ENOSPC))
        with pytest.raises(WriteError, match=r"results\.parquet cannot be written: No space left"):
            folder.merge()
    assert pd.read_parquet(folder.out)["unit_id"].unique().tolist() == [A]
    assert folder.rows()["unit_id"].unique().tolist() == [A, B]
    folder.merge()
    assert pd.read_parquet(folder.out)["unit_id"].unique().tolist() == [A, B]


@pytest.mark.parametrize("step", [STEPS[0], STEPS[2]], ids=lambda step: step[1])
def test_a_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str]) -> None:
    store = SegmentStore(tmp_path)
    store.save("u", 0, {"n": np.array(1)})
    with monkeypatch.context() as patch:
        patch.setattr(*step, failing(errno.ENOSPC))
        with pytest.raises(WriteError, match="free some space"):
            store.save("u", 1, {"n": np.array(2)})
    assert store.segments("u") == {0}
    assert list(tmp_path.rglob("*.tmp")) == []


@failures
@steps
def test_an_artifact_is_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: tuple[Any, str]
) -> None:
    store = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(*step, failing(number))
        with pytest.warns(UserWarning, match="kept in memory"):
            first = store.get("mean", {}, lambda: {"n": np.array(1)})
    assert store.get("mean", {}, dict) is first
    assert Store(tmp_path).find("mean", {}) is None
    assert list(tmp_path.rglob("*.tmp")) == []


@steps
def test_a_table_of_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str]
) -> None:
    store = Store(tmp_path)

    def write() -> None:
        with store.shard_writer("pooled", {}, rows=2) as writer:
            writer.append({"x": np.zeros((3, 2))})

    with monkeypatch.context() as patch:
        patch.setattr(*step, failing(errno.ENOSPC))
        with pytest.raises(WriteError, match="free some space"):
            write()
    assert list((tmp_path / "shards" / "pooled").iterdir()) == []
    write()
    assert store.shards("pooled", {}) is not None


def test_an_out_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot be written"):
        ResultsFolder(tmp_path / "file" / "results", create=True)


def test_an_out_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", failing(errno.ENOSPC))
    with pytest.raises(ResultsError, match="free some space"):
        ResultsFolder(tmp_path / "results", create=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "results", create=True)
    folder.write_unit(A, {}, unit(A))
    folder.out.chmod(0o500)
    try:
        assert len(ResultsFolder(folder.out).rows()) == 4  # it can still be read
        with pytest.raises(ResultsError, match="may write to"):
            ResultsFolder(folder.out, create=True)
    finally:
        folder.out.chmod(0o700)
