"""The schema of a row, and the folder of results."""

from __future__ import annotations

import math
import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saebench.errors import ResultsError
from saebench.results import COLUMNS, ResultsFolder, arrow_schema, columns_table, schema
from saebench.results.seal import parquet_bytes, read_parquet
from saebench.results.table import conform, table_of
from tests.results_rows import row, unit

A, B, C = "a" * 32, "b" * 32, "c" * 32
ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    return ResultsFolder(tmp_path / "results", create=True)


# The schema


def test_the_page_of_columns_is_the_code() -> None:
    page = (ROOT / "docs/results.md").read_text()
    found = re.search(r"<!-- columns -->\n(.*?)\n<!-- /columns -->", page, re.DOTALL)
    assert found, "docs/results.md has no table of columns"
    assert found[1] == columns_table(), (
        "docs/results.md is not what saebench.results.columns_table() prints"
    )


def test_column_names_are_unique_and_documented() -> None:
    assert len({column.name for column in COLUMNS}) == len(COLUMNS)
    assert all(column.doc for column in COLUMNS)
    assert all(column.nullable for column in COLUMNS if column.variant)


def test_plain_pandas_reads_dtypes_that_do_not_depend_on_the_data(folder: ResultsFolder) -> None:
    folder.write_unit(A, {}, [row(A, limit=100, sae_seed=1, git_dirty=True, k=3)])
    full = pd.read_parquet(folder.merge()).dtypes
    folder.write_unit(A, {}, [row(A, value=None, note="why")])
    empty = pd.read_parquet(folder.merge()).dtypes
    pd.testing.assert_series_equal(full, empty)
    assert full["limit"] == full["sae_seed"] == full["k"] == pd.Int64Dtype()
    assert full["git_dirty"] == pd.BooleanDtype()
    assert full["n"] == np.int64
    assert full["value"] == np.float64


def test_values_come_back_exactly(folder: ResultsFolder) -> None:
    values = [0.1, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, None]
    rows = [row(A, f"m{i}", value, note="?") for i, value in enumerate(values)]
    folder.write_unit(A, {}, rows)
    found = folder.rows().sort_values("metric")["value"].to_list()
    assert [math.copysign(1, x) for x in found[:-1]] == [1, 1, -1, 1, 1]
    assert found[:-1] == values[:-1]
    assert math.isnan(found[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valeu": 1.0}, "'valeu' is not a column of the results\n.*did you mean 'value'"),
        ({"value": math.nan}, "value is nan\n.*None, with a note"),
        ({"ci_high": math.inf}, "ci_high is inf"),
        ({"value": None}, "undefined, and no note says why"),
        ({"task": None}, "the column 'task' is missing"),
        ({"variant": "tau=0.5"}, "not what its columns say, ''"),
        ({"variant": "colour=red"}, "not what its columns say.*\n.*a variant may name"),
        ({"n": "many"}, "the column 'n' holds int64, not 'many'"),
        ({"n": 1.5}, "the column 'n' holds int64, not 1.5"),
        ({"n": True}, "the column 'n' holds int64, not True"),
        ({"value": "0.5"}, "the column 'value' holds float64, not '0.5'"),
        ({"sae": 3}, "the column 'sae' holds string, not 3"),
        ({"created_utc": "today"}, "the column 'created_utc' holds timestamp, not 'today'"),
    ],
)
def test_a_row_that_the_schema_does_not_allow(
    folder: ResultsFolder, change: dict, message: str
) -> None:
    with pytest.raises(ResultsError, match=re.compile(message, re.DOTALL)):
        folder.write_unit(A, {}, [row(A) | change])
    assert not folder.has(A)
    assert folder.rows().empty


def test_two_rows_of_one_key(folder: ResultsFolder) -> None:
    with pytest.raises(ResultsError, match="two rows of one key"):
        folder.write_unit(A, {}, [row(A), row(A, value=0.5)])
    folder.write_unit(A, {}, [row(A), row(A, tau=0.01), row(A, tau=0.1), row(A, group="cls")])
    assert folder.rows()["variant"].to_list() == ["", "tau=0.01", "tau=0.1", ""]
    assert folder.rows()["tau"].dropna().to_list() == [0.01, 0.1]


def test_a_unit_of_no_rows_or_of_another_unit(folder: ResultsFolder) -> None:
    with pytest.raises(ResultsError, match="has no rows"):
        folder.write_unit(A, {}, [])
    with pytest.raises(ResultsError, match="rows of the unit b"):
        folder.write_unit(A, {}, [row(A), row(B)])


def test_files_are_plain_parquet_sealed_as_the_protocol_says(folder: ResultsFolder) -> None:
    folder.write_unit(A, {}, unit(A))
    path = folder.out / "_rows" / f"{A}.parquet"
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert sha256(data[: footer - 32] + data[footer:]).digest() == data[footer - 32 : footer]
    assert pq.read_table(path).equals(table_of(unit(A)))


# Units


def test_a_unit_is_done_once_its_rows_are_there(folder: ResultsFolder) -> None:
    assert not folder.has(A)
    folder.write_unit(A, {"seed": 0}, unit(A))
    assert folder.has(A)
    assert folder.unit_ids() == [A]
    assert folder.identities() == {A: {"seed": 0}}
    folder.remove(A)
    assert not folder.has(A)
    assert folder.identities() == {}
    assert [p for p in folder.out.rglob("*") if A in p.name] == []


def test_rows_are_written_last(folder: ResultsFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import saebench.results.folder as module

    written: list[str] = []
    monkeypatch.setattr(
        module, "write_files", lambda files: written.extend(f.parent.name + f.suffix for f in files)
    )
    folder.write_unit(A, {}, unit(A), {"latent": np.arange(2)}, {"all|m0|": np.zeros(500)})
    assert written == ["_latents.parquet", "_replicates.parquet", "_rows.json", "_rows.parquet"]


def test_errors_are_recorded_until_the_unit_is_done(folder: ResultsFolder) -> None:
    folder.write_error(A, {"seed": 0}, ResultsError("too wide", "narrow it"), "Traceback …")
    folder.write_error(B, {}, ValueError())
    records = folder.errors()
    assert set(records) == {A, B}
    assert records[A]["error"] == "too wide"
    assert records[A]["hint"] == "narrow it"
    assert records[A]["traceback"] == "Traceback …"
    assert records[A]["identity"] == {"seed": 0}
    assert records[B]["error"] == records[B]["type"] == "ValueError"
    folder.write_unit(A, {}, unit(A))
    assert set(folder.errors()) == {B}
    folder.clear_error(B)
    folder.clear_error(B)
    assert folder.errors() == {}


def test_latents_and_replicates(folder: ResultsFolder) -> None:
    values = np.random.default_rng(0).random((2, 500))
    latents = {
        "latent": np.arange(3),
        "group": np.array(["all"] * 3),
        "density": np.array([0.5, 0.0, 0.25]),
        "top_id": np.array([["test/1", "test/2"], ["", ""], ["test/3", ""]]),
        "top_value": np.array([[2.0, 1.0], [np.nan, np.nan], [3.0, np.nan]]),
    }
    rows = [row(A, "m0", sae="s"), row(A, "m1", tau=0.1, sae="s")]
    folder.write_unit(A, {}, rows, latents, {"all|m0|": values[0], "all|m1|tau=0.1": values[1]})
    folder.write_unit(B, {}, unit(B), {"latent": np.arange(1), "other": np.array([1.5])})
    folder.write_unit(C, {}, unit(C))

    found = folder.latents()
    assert found["unit_id"].to_list() == [A, A, A, B]
    assert found["sae"].to_list() == ["s", "s", "s", "x"]
    assert found["density"].to_list()[:3] == [0.5, 0.0, 0.25]
    assert list(found["top_id"][0]) == ["test/1", "test/2"]
    np.testing.assert_array_equal(np.stack(found["top_value"][:3]), latents["top_value"])
    assert found["other"].to_list()[3] == 1.5
    assert len(folder.latents([B])) == 1
    assert list(folder.latents([C]).columns) == ["unit_id"]

    kept = folder.replicates([A])
    assert kept["metric"].to_list() == ["m0", "m1"]
    assert kept["variant"].to_list() == ["", "tau=0.1"]
    np.testing.assert_array_equal(np.stack(kept["replicates"]), values)


def test_masked_entries_of_latents_are_left_out(folder: ResultsFolder) -> None:
    mask = [[False, False], [False, True], [True, True]]
    latents = {
        "latent": np.arange(3),
        "first_row": np.ma.masked_array([7, 8, 9], [False, False, True]),
        "max": np.ma.masked_array([0.5, 0.25, 0.0], [False, False, True]),
        "top_images": np.ma.masked_array([[5, 4], [3, 2], [1, 0]], mask),
    }
    folder.write_unit(A, {}, unit(A), latents)
    found = folder.latents()
    assert found["first_row"].dtype == found["latent"].dtype == pd.Int64Dtype()
    assert found["first_row"].dropna().to_list() == [7, 8]
    assert found["max"].to_list()[:2] == [0.5, 0.25]
    assert found["max"].isna().to_list() == [False, False, True]
    assert [images.tolist() for images in found["top_images"]] == [[5, 4], [3], []]
    assert found["top_images"][0].dtype == np.int64


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ({"latent": np.arange(2), "density": np.zeros(3)}, "different lengths"),
        ({"latent": np.arange(2), "sae": np.zeros(2)}, "'sae' is filled in by saebench"),
        ({"latent": np.zeros((2, 2, 2))}, "3 dimensions"),
    ],
)
def test_latents_that_are_no_table(folder: ResultsFolder, latents: dict, message: str) -> None:
    with pytest.raises(ResultsError, match=message):
        folder.write_unit(A, {}, unit(A), latents)
    assert not folder.has(A)


def test_replicates_of_no_row(folder: ResultsFolder) -> None:
    with pytest.raises(ResultsError, match=r"replicates of 'all\|m9\|'"):
        folder.write_unit(A, {}, unit(A), None, {"all|m9|": np.zeros(500)})


# The merged table


@pytest.mark.parametrize("name", ["results", "seed=3"])
def test_pandas_reads_the_folder_as_it_reads_the_table(tmp_path: Path, name: str) -> None:
    folder = ResultsFolder(tmp_path / "run=1" / name, create=True)
    folder.write_unit(A, {}, unit(A, limit=3), {"latent": np.arange(2)}, {"all|m0|": np.zeros(9)})
    folder.write_unit(B, {}, unit(B))
    folder.write_error(C, {}, ValueError("no"))
    folder.partial.save(C, 0, {"n": np.zeros(1)})
    from_rows = folder.rows()
    folder.merge()
    whole = pd.read_parquet(folder.out)
    pd.testing.assert_frame_equal(whole, pd.read_parquet(folder.out / "results.parquet"))
    pd.testing.assert_frame_equal(whole, folder.rows())
    pd.testing.assert_frame_equal(whole, from_rows)
    assert list(whole.columns) == [column.name for column in COLUMNS]


def test_the_order_does_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    units = {A: unit(A, sae="z"), B: unit(B, sae="a"), C: unit(C, backbone="a")}
    frames = []
    for order in ([A, B, C], [C, A, B]):
        folder = ResultsFolder(tmp_path / "".join(order), create=True)
        for unit_id in order:
            folder.write_unit(unit_id, {}, units[unit_id])
        frames.append(pd.read_parquet(folder.merge()))
    pd.testing.assert_frame_equal(*frames)
    assert frames[0]["unit_id"].drop_duplicates().to_list() == [C, B, A]
    assert frames[0]["metric"].to_list() == ["m0", "m1", "m2", "m3"] * 3


def test_rows_are_up_to_date_before_and_after_a_merge(folder: ResultsFolder) -> None:
    folder.write_unit(A, {}, [row(A, value=1.0)])
    folder.merge()
    stamp = folder.path.stat().st_mtime_ns
    folder.merge()
    assert folder.path.stat().st_mtime_ns == stamp  # nothing new: left alone
    folder.write_unit(A, {}, [row(A, value=2.0)])
    folder.write_unit(B, {}, [row(B, value=3.0)])
    assert folder.rows()["value"].to_list() == [2.0, 3.0]
    folder.merge()
    assert pd.read_parquet(folder.out)["value"].to_list() == [2.0, 3.0]
    folder.remove(A)
    assert folder.rows()["value"].to_list() == [3.0]
    folder.merge()
    assert pd.read_parquet(folder.out)["value"].to_list() == [3.0]


def test_an_empty_folder_has_an_empty_table(folder: ResultsFolder) -> None:
    assert folder.rows().empty
    assert list(folder.rows().columns) == [column.name for column in COLUMNS]
    assert pd.read_parquet(folder.merge()).empty
    assert folder.latents().empty
    assert folder.replicates().empty


# Folders that are not ours


def test_reading_makes_nothing(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "results")
    assert folder.rows().empty
    assert not folder.has(A)
    assert folder.errors() == folder.identities() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_file_and_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="is a file"):
        ResultsFolder(tmp_path / "file", create=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ResultsError, match=r"not a results folder: it holds thesis\.tex"):
        ResultsFolder(tmp_path / "other", create=True)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_a_folder_of_a_newer_schema(folder: ResultsFolder) -> None:
    (folder.out / "_schema.json").write_text('{"schema_version": 2}')
    for create in (False, True):
        with pytest.raises(ResultsError, match=r"rows of schema 2; this one knows schema 1"):
            ResultsFolder(folder.out, create=create)


def test_one_file_of_a_newer_schema_is_no_damage(folder: ResultsFolder) -> None:
    folder.write_unit(A, {}, unit(A))
    table = table_of(unit(B)).replace_schema_metadata({"saebench_schema": "2"})
    path = folder.out / "_rows" / f"{B}.parquet"
    path.write_bytes(parquet_bytes(table))
    with pytest.raises(ResultsError, match="written by a newer saebench"):
        folder.merge()
    assert path.exists()


def test_a_column_of_a_newer_saebench_is_not_dropped_in_silence(folder: ResultsFolder) -> None:
    table = table_of(unit(A)).append_column("hue", pa.array([1, 2, 3, 4]))
    (folder.out / "_rows" / f"{A}.parquet").write_bytes(parquet_bytes(table))
    with pytest.raises(ResultsError, match="the columns hue"):
        folder.rows()


def test_a_column_that_came_later_reads_as_empty(folder: ResultsFolder) -> None:
    table = table_of(unit(A)).drop_columns(["tau", "k"])
    (folder.out / "_rows" / f"{A}.parquet").write_bytes(parquet_bytes(table))
    assert folder.rows()["k"].isna().all()
    assert folder.rows()["k"].dtype == pd.Int64Dtype()
    assert len(folder.rows()) == 4


def test_an_older_schema_is_migrated_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    old = table_of(unit(A)).rename_columns({"value": "measured"})
    old = old.replace_schema_metadata({"saebench_schema": "0"})
    monkeypatch.setitem(
        schema.MIGRATIONS, 0, lambda table: table.rename_columns({"measured": "value"})
    )
    assert conform(old, Path("old.parquet")).equals(table_of(unit(A)))


# Golden folders: what was written once is read for ever


def test_golden_schema_1() -> None:
    folder = ResultsFolder(ROOT / "tests/golden/schema-1")
    unit_id = "5ae9e0b7c1d24f3c8a61b0d9f2c47e35"
    rows = folder.rows()
    merged = pd.read_parquet(folder.path)
    pd.testing.assert_frame_equal(rows[list(merged.columns)], merged)
    assert rows["metric"].to_list() == ["fvu", "l0", "dense_fraction", "fvu"]
    assert rows["group"].to_list() == ["all", "all", "all", "cls"]
    assert rows["variant"].to_list() == ["", "", "tau=0.01", ""]
    assert rows["value"].to_list()[:3] == [0.2512345678901234, 31.5, 0.0625]
    assert math.isnan(rows["value"][3])
    assert rows["note"][3] == "no variance"
    assert rows["tau"].to_list()[2] == 0.01
    assert rows["ci_low"][0] == 0.2434567890123456
    assert set(rows["unit_id"]) == {unit_id}
    assert rows["created_utc"][0] == pd.Timestamp("2025-03-01T12:00:00Z")
    assert rows["limit"].to_list() == [64] * 4
    assert folder.has(unit_id)
    assert folder.identities()[unit_id]["seed"] == 0
    assert folder.latents()["density"].to_list() == [0.5, 0.0]
    assert [list(ids) for ids in folder.latents()["top_id"]] == [["test/3", "test/1"], ["", ""]]
    assert folder.replicates()["replicates"][0].tolist() == [0.25, 0.5, 0.125]
    assert folder.errors()["0" * 32]["error"] == "activations are not finite"
    assert folder.partial.load(unit_id, 2) is not None


def test_golden_metadata_is_what_is_written_now() -> None:
    path = ROOT / "tests/golden/schema-1/_rows/5ae9e0b7c1d24f3c8a61b0d9f2c47e35.parquet"
    assert read_parquet(path).schema.metadata[b"saebench_schema"] == b"1"
    assert b"saebench_schema" in arrow_schema().metadata
