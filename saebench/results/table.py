"""Rows to and from tables, strictly by the schema. Every file of rows says its schema's version."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from saebench.errors import ResultsError
from saebench.results.schema import (
    BY_NAME,
    COLUMNS,
    KEY,
    MIGRATIONS,
    SCHEMA_VERSION,
    VARIANT_COLUMNS,
    Type,
    arrow_schema,
)
from saebench.results.seal import DamagedFile, read_parquet
from saebench.task import variant_string

_VERSION = b"saebench_schema"

_PYTHON: dict[Type, tuple[type, ...]] = {
    "string": (str,),
    "int64": (int, np.integer),
    "float64": (float, int, np.floating, np.integer),
    "timestamp": (datetime,),
}


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table, checked.

    Errors: ResultsError for an unknown or a missing column, a value of the wrong type, a NaN or
    infinity, a variant that its columns do not say, an undefined value without a note, and two
    rows of one key.
    """
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        _check_row(row)
        key = tuple(row[name] for name in KEY)
        if key in seen:
            raise ResultsError(
                f"two rows of one key: {_where(row)}",
                "what distinguishes them belongs into the measurement's group or variant",
            )
        seen.add(key)
    arrays = [pa.array([r.get(f.name) for r in rows], type=f.type) for f in arrow_schema()]
    return pa.table(arrays, schema=arrow_schema())


def _where(row: Mapping[str, Any]) -> str:
    names = ("backbone", "sae", "task", "metric", "group", "variant")
    return " · ".join(str(row[name]) for name in names if row.get(name))


def _check_row(row: Mapping[str, Any]) -> None:
    for name in row:
        if name not in BY_NAME:
            near = get_close_matches(name, BY_NAME, n=1, cutoff=0.5)
            raise ResultsError(
                f"{_where(row)}: '{name}' is not a column of the results",
                f"did you mean '{near[0]}'?" if near else _variant_hint(),
            )
    for column in COLUMNS:
        value = row.get(column.name)
        if value is None:
            if not column.nullable:
                raise ResultsError(f"{_where(row)}: the column '{column.name}' is missing")
        elif not _is(value, column.type):
            raise ResultsError(
                f"{_where(row)}: the column '{column.name}' holds {column.type}, not {value!r}"
            )
        elif column.type == "float64" and not math.isfinite(value):
            raise ResultsError(
                f"{_where(row)}: {column.name} is {value}",
                "an undefined value is None, with a note that says why",
            )
    if row.get("value") is None and not row["note"]:
        raise ResultsError(f"{_where(row)}: the value is undefined, and no note says why")
    typed = {name: row[name] for name in VARIANT_COLUMNS if row.get(name) is not None}
    # A row states more than what tells it from the default: the default's own temperature, say.
    items = row["variant"].split(";")
    named = {name: value for name, value in typed.items() if f"{name}={value}" in items}
    if row["variant"] != variant_string(named):
        raise ResultsError(
            f"{_where(row)}: the variant '{row['variant']}' is not what its columns say, "
            f"'{variant_string(typed)}'",
            _variant_hint(),
        )


def _variant_hint() -> str:
    return f"a variant may name {', '.join(sorted(VARIANT_COLUMNS))}"


def _is(value: Any, type: Type) -> bool:
    """Whether a value may stand in a column: pyarrow itself would cut 1.5 down to the integer 1."""
    if type == "bool" or isinstance(value, (bool, np.bool_)):
        return type == "bool" and isinstance(value, (bool, np.bool_))
    return isinstance(value, _PYTHON[type])


def read_rows(path: Path) -> pa.Table:
    """A table of rows of this or an older schema, brought to this one.

    Errors: DamagedFile; ResultsError when it was written by a newer saebench; FileNotFoundError.
    """
    return conform(read_parquet(path), path)


def conform(table: pa.Table, path: Path) -> pa.Table:
    """A table as it was read from `path`, brought to this schema."""
    version = (table.schema.metadata or {}).get(_VERSION, b"")
    if not version.isdigit():
        raise DamagedFile(f"{path} does not hold rows of saebench")
    check_version(int(version), path)
    for step in range(int(version), SCHEMA_VERSION):
        table = MIGRATIONS[step](table)
    if table.schema.equals(arrow_schema()):
        return table.replace_schema_metadata(arrow_schema().metadata)
    unknown = [name for name in table.column_names if name not in BY_NAME]
    if unknown:
        raise newer(path, f"the columns {', '.join(unknown)}")
    arrays = []
    for column, field in zip(COLUMNS, arrow_schema(), strict=True):
        if column.name in table.column_names:
            arrays.append(table.column(column.name).cast(field.type))
        elif column.nullable:
            arrays.append(pa.nulls(table.num_rows, field.type))
        else:
            raise DamagedFile(f"{path} is damaged: the column '{column.name}' is missing")
    return pa.table(arrays, schema=arrow_schema())


def check_version(version: int, path: Path) -> None:
    """Errors: ResultsError for rows of a schema that this saebench does not know."""
    if version > SCHEMA_VERSION:
        raise newer(path, f"rows of schema {version}; this one knows schema {SCHEMA_VERSION}")


def newer(path: Path, what: str) -> ResultsError:
    """The error for something that only a newer saebench can have written."""
    return ResultsError(
        f"{path} was written by a newer saebench: it holds {what}",
        "pip install --upgrade saebench-vision   or choose another folder with --out",
    )
