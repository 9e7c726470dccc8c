"""The two tables beside a unit's rows: its latents, and its bootstrap replicates.

Both carry the names that a reader joins and filters by: `unit_id backbone dataset sae task`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from saebench.errors import ResultsError

if TYPE_CHECKING:
    import pandas as pd

_NAMES = ("unit_id", "backbone", "dataset", "sae", "task")


def latents_table(row: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> pa.Table:
    """A task's latents: `columns` of equal length, beside the names of the unit's rows.

    An array [n] is a column, an array [n m] a column of lists of m. Masked entries are empty in a
    column and left out of a list. Errors: ResultsError.
    """
    lengths = {name: len(array) for name, array in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ResultsError(f"{row['task']}: latents columns of different lengths: {lengths}")
    if taken := sorted(set(columns) & set(_NAMES)):
        raise ResultsError(
            f"{row['task']}: the latents column '{taken[0]}' is filled in by saebench",
            "give it another name",
        )
    n = next(iter(lengths.values()))
    arrays = {name: pa.array([row[name]] * n, pa.string()) for name in _NAMES}
    return pa.table(arrays | {name: _array(name, a) for name, a in columns.items()})


def _array(name: str, array: np.ndarray) -> pa.Array:
    if array.ndim == 1:
        return pa.array(array)
    if array.ndim == 2:
        kept = ~np.ma.getmaskarray(array)
        offsets = np.concatenate([[0], kept.sum(axis=1).cumsum()]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, np.asarray(array)[kept])
    raise ResultsError(f"the latents column '{name}' has {array.ndim} dimensions: 1 or 2 are meant")


def side_frame(tables: Sequence[pa.Table]) -> pd.DataFrame:
    """Tables of several units as one; integers are `Int64` whether one is empty or none."""
    import pandas as pd

    whole = pa.concat_tables(tables, promote_options="permissive")
    return whole.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)


def replicates_table(
    rows: Sequence[Mapping[str, Any]], replicates: Mapping[str, np.ndarray]
) -> pa.Table:
    """Replicate values by `group|metric|variant`, one row a measured number.

    Errors: ResultsError for a key that no row has.
    """
    by_key = {f"{row['group']}|{row['metric']}|{row['variant']}": row for row in rows}
    if unknown := sorted(set(replicates) - set(by_key)):
        raise ResultsError(f"replicates of '{unknown[0]}', which is not among the unit's rows")
    chosen = [by_key[key] for key in replicates]
    names = (*_NAMES, "split", "group", "metric", "variant")
    arrays: dict[str, pa.Array] = {
        name: pa.array([row[name] for row in chosen], pa.string()) for name in names
    }
    values = [np.asarray(array, dtype=np.float64) for array in replicates.values()]
    arrays["replicates"] = pa.array(values, pa.list_(pa.float64()))
    return pa.table(arrays)
