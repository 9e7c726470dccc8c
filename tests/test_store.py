"""The store: artifacts built once and checked, and long tables in shards."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from saebench.entries import entry_id
from saebench.shards import ShardWriter, open_shards
from saebench.store import Store
from saebench.tensors import memory_map, to_bytes

FIELDS = {"backbone": "tiny", "n": 3, "layers": [1, 2]}


def arrays() -> dict[str, np.ndarray]:
    return {"mean_d": np.array([0.1, np.pi]), "n": np.array(2**60 + 1)}


class Counted:
    """A build that counts how often it was asked for."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.n += 1
        return arrays()


def test_what_is_there_is_not_built_again(tmp_path: Path) -> None:
    build = Counted()
    first = Store(tmp_path).get("mean", FIELDS, build)
    again = Store(tmp_path).get("mean", dict(reversed(FIELDS.items())), build)
    assert build.n == 1
    assert first.id == again.id
    assert {k: (a.dtype, a.tobytes()) for k, a in again.arrays.items()} == {
        k: (a.dtype, a.tobytes()) for k, a in arrays().items()
    }
    assert again.meta["fields"] == FIELDS


def test_a_mapped_artifact_lies_in_its_file(tmp_path: Path) -> None:
    build, large = Counted(), {"W": np.arange(2.0**17)}
    files = Path("/proc/self/fd")
    n_open = len(list(files.iterdir())) if files.is_dir() else 0
    store = Store(tmp_path)
    made = [
        store.get("mean", FIELDS, build, mapped=True),
        Store(tmp_path).get("w", {}, lambda: large, mapped=True),
    ]
    found = Store(tmp_path).find("mean", FIELDS, mapped=True)
    assert found is not None
    for artifact in (made[0], found):
        assert artifact.arrays["n"] == 2**60 + 1
        np.testing.assert_array_equal(artifact.arrays["mean_d"], arrays()["mean_d"])
    W = made[1].arrays["W"]
    assert W.base is not None  # of a map, not memory of its own
    np.testing.assert_array_equal(W, large["W"])
    W[0] = 7.0  # into memory alone
    assert not store.verify()
    assert build.n == 1
    if n_open:
        assert len(list(files.iterdir())) == n_open


def test_a_mapped_artifact_is_checked_once(tmp_path: Path) -> None:
    build, data = Counted(), "data.safetensors"
    Store(tmp_path).put("mean", FIELDS, arrays())
    (file,) = tmp_path.glob(f"artifacts/mean/*/{data}")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    store = Store(tmp_path)
    with pytest.warns(UserWarning, match="built anew: data.safetensors was altered"):
        store.get("mean", FIELDS, build, mapped=True)
    assert build.n == 1
    assert store.get("mean", FIELDS, build, mapped=True).arrays["n"] == 2**60 + 1


def test_what_is_to_be_mapped_and_cannot_be_written_is_in_memory(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    store, build = Store(tmp_path / "a file"), Counted()
    with pytest.warns(UserWarning, match="kept in memory"):
        store.get("mean", FIELDS, build, mapped=True)
    assert store.get("mean", FIELDS, build, mapped=True).arrays["n"] == 2**60 + 1
    assert build.n == 1


def test_every_field_counts(tmp_path: Path) -> None:
    ids = {
        entry_id("mean", FIELDS),
        entry_id("scatter", FIELDS),
        entry_id("mean", FIELDS | {"n": 4}),
        entry_id("mean", FIELDS | {"n": 3.0}),
        entry_id("mean", FIELDS | {"more": None}),
    }
    assert len(ids) == 5
    # Of protocol 1: this may change only together with the protocol's version.
    assert entry_id("mean", FIELDS) == "8143b41f0f9feb60e39760719ffa943b"
    with pytest.raises(ValueError, match="cannot name a kind"):
        Store(tmp_path).find("../mean", FIELDS)


def test_find_has_and_put(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.find("mean", FIELDS) is None
    assert not store.has("mean", FIELDS)
    kept = store.put("mean", FIELDS, arrays())
    assert store.has("mean", FIELDS)
    assert store.ids() == store.ids("mean") == [kept.id]
    assert store.ids("other") == []
    assert store.verify() == []
    files = list((tmp_path / "artifacts" / "mean" / kept.id).iterdir())
    assert store.size() == sum(file.stat().st_size for file in files)


def test_anybody_can_read_an_artifact(tmp_path: Path) -> None:
    kept = Store(tmp_path).put("mean", FIELDS, arrays())
    folder = tmp_path / "artifacts" / "mean" / kept.id
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["protocol"] == 1
    assert manifest["id"] == folder.name
    np.testing.assert_array_equal(load_file(folder / "data.safetensors")["mean_d"], [0.1, np.pi])


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail() -> dict[str, np.ndarray]:
        raise RuntimeError("no images")

    with pytest.raises(RuntimeError, match="no images"):
        store.get("mean", FIELDS, fail)
    build = Counted()
    store.get("mean", FIELDS, build)
    assert build.n == 1


def test_a_store_that_cannot_be_written_works_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store, build = Store(tmp_path / "file" / "store"), Counted()
    with pytest.warns(UserWarning, match="kept in memory.*\n.*SAEBENCH_STORE"):
        first = store.get("mean", FIELDS, build)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        store.get("scatter", FIELDS, build)
    assert store.get("mean", FIELDS, build) is first
    assert build.n == 2


# Shards


def rows(n: int, start: int = 0) -> dict[str, np.ndarray]:
    index = np.arange(start, start + n)
    return {"x": np.outer(index, [1.0, 0.5, 0.25]).astype(np.float32), "label": index}


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [3, 7], [0, 9, 1]])
def test_shards_do_not_depend_on_the_pieces(tmp_path: Path, pieces: list[int]) -> None:
    store = Store(tmp_path)
    with store.shard_writer("pooled", FIELDS, rows=4) as writer:
        start = 0
        for n in pieces:
            piece = rows(n, start)
            writer.append(piece)
            piece["x"][:] = -1  # a caller's buffer is its own
            start += n
    table = store.shards("pooled", FIELDS)
    assert table is not None
    assert table.n_rows == 10
    shards = list(table)
    assert [len(shard["x"]) for shard in shards] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in shards]), rows(10)["x"])
    np.testing.assert_array_equal(np.concatenate([s["label"] for s in shards]), np.arange(10))
    assert not shards[0]["x"].flags.writeable
    assert store.ids("pooled") == [table.id]
    assert store.verify() == []
    assert [path.name for path in table.folder.parent.iterdir()] == [table.id]


def test_nothing_is_seen_of_an_unfinished_table(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def write_and_fail() -> None:
        with store.shard_writer("pooled", FIELDS, rows=4) as writer:
            for start in (0, 4, 8):
                writer.append(rows(4, start))
                assert store.shards("pooled", FIELDS) is None
                assert store.ids() == []
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert list((tmp_path / "shards" / "pooled").iterdir()) == []


def test_two_writers_of_one_table(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.shard_writer("pooled", FIELDS) as a, store.shard_writer("pooled", FIELDS) as b:
        a.append(rows(3))
        b.append(rows(3))
    table = store.shards("pooled", FIELDS)
    assert table is not None
    assert table.n_rows == 3
    assert len(store.ids()) == 1


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    with Store(tmp_path).shard_writer("pooled", FIELDS) as writer:
        writer.append(rows(3))
        for bad in (
            {"x": rows(3)["x"]},
            rows(3) | {"x": np.zeros((3, 2), np.float32)},
            rows(3) | {"x": np.zeros((3, 3))},
            rows(3) | {"label": np.arange(2)},
        ):
            with pytest.raises(ValueError, match="do not fit"):
                writer.append(bad)
    with pytest.raises(ValueError, match="without rows"), ShardWriter(tmp_path, "empty", FIELDS):
        pass


def test_a_damaged_table_is_not_given_and_can_be_written_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        with store.shard_writer("pooled", FIELDS, rows=4) as writer:
            writer.append(rows(10))
        table = store.shards("pooled", FIELDS)
        assert table is not None
        shard = table.folder / "00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x99")
        with pytest.warns(UserWarning, match=r"00001\.safetensors was altered"):
            assert store.shards("pooled", FIELDS) is None
        assert [problem.what for problem in store.verify()] == ["00001.safetensors was altered"]


def test_a_table_without_one_of_its_shards(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.shard_writer("pooled", FIELDS, rows=4) as writer:
        writer.append(rows(10))
    table = store.shards("pooled", FIELDS)
    assert table is not None
    (table.folder / "00001.safetensors").unlink()
    with pytest.raises(ValueError, match="missing"):
        open_shards(table.folder)


def test_a_memory_map_is_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    kinds = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]
    given = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    path.write_bytes(to_bytes(given))
    found = memory_map(path)
    assert set(found) == set(given)
    for kind, array in given.items():
        assert found[kind].dtype == array.dtype
        np.testing.assert_array_equal(found[kind], array)


def test_what_a_killed_writer_left_goes_after_a_day(tmp_path: Path) -> None:
    left = tmp_path / "shards" / "pooled" / ".x.1-a.tmp"
    left.mkdir(parents=True)
    yesterday = time.time() - 90_000
    os.utime(left, (yesterday, yesterday))
    with Store(tmp_path).shard_writer("pooled", FIELDS) as writer:
        writer.append(rows(1))
    assert not left.exists()
