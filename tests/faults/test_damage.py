"""Files that were truncated, zeroed or altered are seen, named and made anew; never believed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saebench.results import DamagedFile, ResultsFolder
from saebench.results.table import read_rows
from saebench.segments import SegmentStore
from saebench.store import Store
from tests.results_rows import unit

A, B = "a" * 32, "b" * 32


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "halved": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "zeroed": lambda data: bytes(len(data)),
    "its end zeroed": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "a bit flipped": flip,
    "something else": lambda data: b"<html>502 Bad Gateway</html>",
}

damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())


def spoil(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    folder = ResultsFolder(tmp_path / "results", create=True)
    latents, replicates = {"latent": np.arange(3)}, {"all|m0|": np.ones(5)}
    for unit_id in (A, B):
        folder.write_unit(unit_id, {"of": unit_id}, unit(unit_id), latents, replicates)
    return folder


@damages
def test_rows(folder: ResultsFolder, damage: Callable[[bytes], bytes]) -> None:
    folder.merge()
    path = folder.out / "_rows" / f"{A}.parquet"
    spoil(path, damage)
    spoiled = path.read_bytes()
    assert not folder.has(A)
    with pytest.warns(UserWarning, match=f"{A}.parquet is damaged"):
        assert folder.rows()["unit_id"].unique().tolist() == [B]
    with pytest.warns(UserWarning, match=f"{A}.parquet is damaged.*\n.*measured anew"):
        folder.merge()
    assert pd.read_parquet(folder.out)["unit_id"].unique().tolist() == [B]
    assert path.with_name(f"{A}.parquet.damaged").read_bytes() == spoiled
    assert "is damaged" in folder.errors()[A]["error"]
    assert folder.errors()[A]["identity"] == {"of": A}

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        folder.merge()
        folder.write_unit(A, {}, unit(A))
        folder.merge()
    assert pd.read_parquet(folder.out)["unit_id"].unique().tolist() == [A, B]
    assert folder.errors() == {}


def test_any_flipped_bit_of_rows(folder: ResultsFolder, tmp_path: Path) -> None:
    data = (folder.out / "_rows" / f"{A}.parquet").read_bytes()
    path = tmp_path / "spoiled.parquet"
    for place in range(0, len(data), 23):
        spoiled = bytearray(data)
        spoiled[place] ^= 1 << place % 8
        path.write_bytes(spoiled)
        with pytest.raises(DamagedFile):
            read_rows(path)


def test_rows_under_the_name_of_another_unit(folder: ResultsFolder) -> None:
    rows = folder.out / "_rows"
    (rows / f"{B}.parquet").write_bytes((rows / f"{A}.parquet").read_bytes())
    with pytest.warns(UserWarning, match=f"{B}.parquet is damaged: it holds rows of another unit"):
        folder.merge()
    assert not folder.has(B)


@damages
def test_the_merged_table(folder: ResultsFolder, damage: Callable[[bytes], bytes]) -> None:
    expected = pd.read_parquet(folder.merge())
    spoil(folder.path, damage)
    pd.testing.assert_frame_equal(folder.rows(), expected)
    pd.testing.assert_frame_equal(pd.read_parquet(folder.merge()), expected)


@damages
def test_what_stands_beside_the_rows(
    folder: ResultsFolder, damage: Callable[[bytes], bytes]
) -> None:
    spoil(folder.out / "_latents" / f"{A}.parquet", damage)
    spoil(folder.out / "_replicates" / f"{B}.parquet", damage)
    with pytest.warns(UserWarning, match=f"_latents/{A}.parquet is damaged"):
        assert folder.latents()["unit_id"].unique().tolist() == [B]
    with pytest.warns(UserWarning, match=f"_replicates/{B}.parquet is damaged"):
        assert folder.replicates()["unit_id"].unique().tolist() == [A]
    assert len(folder.rows()) == 8


@damages
def test_identity_error_record_and_marker(
    folder: ResultsFolder, damage: Callable[[bytes], bytes]
) -> None:
    folder.write_error("c" * 32, {}, ValueError("no"))
    spoil(folder.out / "_rows" / f"{A}.json", damage)
    spoil(folder.out / "_errors" / f"{'c' * 32}.json", damage)
    spoil(folder.out / "_schema.json", damage)
    again = ResultsFolder(folder.out, create=True)
    assert set(again.errors()) == {"c" * 32}
    assert again.errors()["c" * 32]["error"]
    assert again.identities()[B] == {"of": B}
    assert len(again.rows()) == 8


@damages
def test_a_segment(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    store = SegmentStore(tmp_path)
    for segment in (0, 1):
        store.save("u", segment, {"sum": np.arange(5.0)})
    spoil(tmp_path / "u" / "000001.state", damage)
    with pytest.warns(UserWarning, match=r"segment 1 is computed anew"):
        assert store.load("u", 1) is None
    assert store.segments("u") == {0}
    assert store.load("u", 0) is not None


@damages
@pytest.mark.parametrize("name", ["data.safetensors", "manifest.json"])
def test_an_artifact(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    store, fields = Store(tmp_path), {"n": 1}
    good = {"mean": np.arange(5.0)}
    kept = store.put("mean", fields, good)
    path = tmp_path / "artifacts" / "mean" / kept.id / name
    if (name, damage) == ("manifest.json", DAMAGES["a bit flipped"]):
        damage = lambda data: data.replace(b'"n": 1', b'"n": 2')  # noqa: E731
    if (name, damage) == ("manifest.json", DAMAGES["one byte less"]):
        damage = DAMAGES["halved"]
    spoil(path, damage)
    assert [problem.folder for problem in store.verify()] == [path.parent]
    with pytest.warns(UserWarning, match="is built anew"):
        again = store.get("mean", fields, lambda: good)
    np.testing.assert_array_equal(again.arrays["mean"], good["mean"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.get("mean", fields, dict).id == kept.id
    assert store.verify() == []
