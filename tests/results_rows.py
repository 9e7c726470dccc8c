"""Rows to test with: everything a row needs, for units of any name."""

from __future__ import annotations

import datetime
from typing import Any

from saebench.results import COLUMNS
from saebench.task import variant_string

_BY_TYPE = {
    "string": "x",
    "int64": 3,
    "float64": 0.5,
    "bool": True,
    "timestamp": datetime.datetime(2025, 3, 1, 12, tzinfo=datetime.UTC),
}


def row(unit_id: str, metric: str = "fvu", value: float | None = 0.25, **given: Any) -> dict:
    """One row; keywords that are variant columns also make up its `variant`."""
    variants = {c.name for c in COLUMNS if c.variant}
    values = {c.name: _BY_TYPE[c.type] for c in COLUMNS if not c.nullable}
    values |= {"unit_id": unit_id, "metric": metric, "value": value, "group": "all", "note": ""}
    values |= {
        "schema_version": 1,
        "variant": variant_string({k: v for k, v in given.items() if k in variants}),
    }
    return values | given


def unit(unit_id: str, n: int = 4, **given: Any) -> list[dict]:
    """A unit of n metrics."""
    return [row(unit_id, f"m{i}", i / 8, **given) for i in range(n)]
