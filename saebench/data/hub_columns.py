"""Columns of a hub dataset as keys, labels and captions, read without touching an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saebench.data.captions import texts_of
from saebench.data.forms import Column
from saebench.data.hub_files import Files
from saebench.data.texts import Texts
from saebench.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

ROW = "row"
"""`[hub] id = "row"`: the row's number is the key, whatever the images are called."""


def column_of(rows: datasets.Dataset, name: str, where: str) -> pa.ChunkedArray:
    """A column, or with `a.b` the part b of column a. Errors: DataError listing what there is."""
    import pyarrow.compute as pc

    first, *parts = name.split(".") if name not in rows.column_names else [name]
    if first not in rows.column_names:
        raise DataError(
            f"{where}: there is no column '{first}'",
            f"its columns: {', '.join(rows.column_names)}; name them in [hub] of the entry",
        )
    column = rows.data.column(first)
    for part in parts:
        fields = [field.name for field in column.type] if _is_struct(column) else []
        if part not in fields:
            raise DataError(
                f"{where}: '{name}' has no part '{part}'",
                f"its parts: {', '.join(fields) or 'none'}",
            )
        column = pc.struct_field(column, part)  # pyright: ignore
    return column


def _is_struct(column: pa.ChunkedArray) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(column.type)


def keys_of(
    rows: datasets.Dataset,
    image: str,
    id_column: str | None,
    files: Files,
    tops: Sequence[str],
    where: str,
) -> Sequence[str]:
    """[n] keys: the id column, else the paths of the images, else the numbers of the rows.

    Images that are files of their own are called by their path below the split: `tops` are the
    names that its folder may have.

    Errors: DataError for ids that are missing, or paths that occur twice.
    """
    if id_column is not None and (id_column != ROW or ROW in rows.column_names):
        column = column_of(rows, id_column, where)
        if column.null_count:
            raise DataError(f"{where}: {column.null_count} rows have no '{id_column}'")
        return Texts.of(str(value) for value in column.to_pylist())
    images = column_of(rows, image, where)
    _are_images(images, image, where)
    paths = None
    if id_column is None and _is_struct(images):
        paths = column_of(rows, f"{image}.path", where)
    if paths is None or paths.null_count == len(paths):
        return Texts.of(f"{row:08d}" for row in range(len(rows)))
    if paths.null_count:
        raise DataError(
            f"{where}: {paths.null_count} of {len(paths)} images have no path to be called by",
            'write  id = "…"  in [hub]: a column, or "row" for the row\'s number',
        )
    found: list[str] = paths.to_pylist()
    if Path(found[0]).is_absolute():
        found = [_below(files.own(path) or path, tops) for path in found]
    if len(set(found)) < len(found):
        raise DataError(
            f"{where}: images have the same path, as '{_twice(found)}'",
            'write  id = "…"  in [hub]: a column, or "row" for the row\'s number',
        )
    return Texts.of(found)


def _below(path: str, tops: Sequence[str]) -> str:
    top, _, rest = path.partition("/")
    return rest if rest and top in tops else path


def _are_images(column: pa.ChunkedArray, name: str, where: str) -> None:
    """Errors: DataError for a column that does not hold encoded images."""
    import pyarrow as pa

    if _is_struct(column):
        holds = {"bytes", "path"} <= {field.name for field in column.type}
    else:
        holds = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    if not holds:
        raise DataError(
            f"{where}: '{name}' is {column.type}, and images are encoded files (PNG, JPEG, …)",
            'name the column of the images:  image = "…"  in [hub]',
        )


def _twice(values: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(value for value in values if value in seen or seen.add(value))  # pyright: ignore


def labels_of(rows: datasets.Dataset, name: str, where: str) -> Column:
    """A column of whole numbers, of ClassLabel numbers with their names, or of names.

    Errors: DataError for a label that is missing or -1, and for what is no label.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import ClassLabel

    column = column_of(rows, name, where)
    if column.null_count:
        raise DataError(
            f"{where}: {column.null_count} of {len(column)} rows have no '{name}'",
            "measure on a split that has labels",
        )
    feature = rows.features.get(name)
    if isinstance(feature, ClassLabel) and pa.types.is_integer(column.type):
        values = column.to_numpy().astype(np.int64)
        if values.size and values.min() < 0:
            raise DataError(
                f"{where}: '{name}' of {int((values < 0).sum())} rows is {values.min()}",
                "these labels are kept back by the dataset's makers: measure on another split",
            )
        return Column(values, tuple(feature.names), ordered=True)
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return Column(column.cast(pa.int64()).to_numpy())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        coded = pc.dictionary_encode(column).combine_chunks()  # pyright: ignore
        names = tuple(coded.dictionary.to_pylist())
        return Column(coded.indices.to_numpy().astype(np.int64), names)
    raise DataError(
        f"{where}: '{name}' is {column.type}, and labels are whole numbers or names",
        f"name another column in [hub]; there are {', '.join(rows.column_names)}",
    )


def captions_of(rows: datasets.Dataset, name: str, where: str) -> Texts:
    """A column of texts, or of lists of texts, of which the first counts; '' where there is none.

    Errors: DataError for a column of anything else.
    """
    import pyarrow as pa

    column = column_of(rows, name, where)
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    texts = (pa.types.is_string, pa.types.is_large_string)
    several = any(kind(column.type) for kind in lists)
    one = column.type.value_type if several else column.type
    if not any(kind(one) for kind in texts):
        raise DataError(
            f"{where}: '{name}' is {column.type}, and captions are texts or lists of texts",
            f"name another column in [hub]; there are {', '.join(rows.column_names)}",
        )

    def written() -> Iterator[str]:
        for chunk in column.chunks:
            for value in chunk.to_pylist():
                yield (value[0] if several and value else value) or ""

    return texts_of(written(), lambda place: f"row {place} of {where}")
