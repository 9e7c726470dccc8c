"""The rows of a split as an Arrow file that is mapped into memory: all, or the first of a stream.

All rows: `datasets` makes the file from the split's own files, once, below `HF_HOME`. The first n
rows of a stream come without downloading the rest, and are kept with their images as

    <store>/streams/<hash of dataset, commit, split and columns>/<n>.arrow

A file of more rows serves for fewer; one of fewer is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from saebench import paths
from saebench.atomic import remove_leftovers, replacing, unwritable
from saebench.data.hub_files import Files
from saebench.errors import DataError
from saebench.identity import content_hash

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_BATCH = 64  # rows of a stream in memory at a time


def all_rows(files: Files, splits: Sequence[str]) -> datasets.Dataset:
    """Every row of the splits, one after the other. Errors: DataError."""
    import datasets

    found = [name for split in splits for name in files.get(split)]
    _check(found, files)
    try:
        with files.asked.explained():
            return datasets.load_dataset(  # pyright: ignore[reportReturnType]
                files.index.reader,
                data_files={"train": found},
                split="train",
                features=_features(files),
            )
    except DataError:
        _check(found, files, whole=True)
        raise


def first_rows(
    files: Files, splits: Sequence[str], columns: Sequence[str], n: int
) -> datasets.Dataset:
    """The first n rows (all, where there are fewer), from the kept file or from the stream.

    Errors: DataError, WriteError.
    """
    import datasets

    folder = _folder(files, splits, columns)
    path = _enough(folder, n)
    if path is None:
        path = folder / f"{n}.arrow"
        smaller = _kept(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        remove_leftovers(folder)
        with replacing(path) as temporary:
            _write(temporary, _stream(files, splits, columns, n), files)
        for old in smaller.values():
            with suppress(OSError):
                old.unlink()
    with files.asked.explained():
        rows = datasets.Dataset.from_file(str(path))
    return rows.select(range(min(n, len(rows))))


def are_kept(files: Files, splits: Sequence[str], columns: Sequence[str], n: int) -> bool:
    """Whether the first n rows need not be streamed any more."""
    return _enough(_folder(files, splits, columns), n) is not None


def _folder(files: Files, splits: Sequence[str], columns: Sequence[str]) -> Path:
    key = {
        "place": files.asked.place,
        "reader": files.index.reader,
        "files": [url for split in splits for url in files.urls(split)],
        "columns": sorted(columns),
    }
    return paths.user_store() / "streams" / content_hash(key)[:32]


def _kept(folder: Path) -> dict[int, Path]:
    """Rows -> the file that has so many."""
    return {int(path.stem): path for path in folder.glob("*.arrow") if path.stem.isdigit()}


def _enough(folder: Path, n: int) -> Path | None:
    kept = _kept(folder)
    size = min((size for size in kept if size >= n), default=None)
    return kept[size] if size is not None else None


def _stream(
    files: Files, splits: Sequence[str], columns: Sequence[str], n: int
) -> Iterator[pa.Table]:
    """Tables of at least one row, n rows in all. Errors: DataError."""
    import datasets

    with files.asked.explained():
        stream = datasets.load_dataset(
            files.index.reader,
            data_files={"train": [url for split in splits for url in files.urls(split)]},
            split="train",
            features=_features(files),
            streaming=True,
        )
        there = list(stream.features or columns)
        if missing := sorted(set(columns) - set(there)):
            raise DataError(
                f"{files.asked.by}: {files.asked.place}: there is no column '{missing[0]}'",
                f"its columns: {', '.join(there)}; name them in [hub] of the entry",
            )
        some = stream.select_columns(list(columns)).take(n).with_format("arrow")
        yield from some.iter(batch_size=_BATCH)  # pyright: ignore[reportReturnType]


def _write(path: Path, tables: Iterator[pa.Table], files: Files) -> None:
    import pyarrow as pa

    first = next(tables, None)
    if first is None:
        raise DataError(f"{files.asked.by}: {files.asked.place}: the stream has no rows")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _features(files: Files) -> datasets.Features | None:
    from datasets import Features

    given = files.index.features
    return Features.from_dict(dict(given)) if given is not None else None


def _check(names: Sequence[str], files: Files, *, whole: bool = False) -> None:
    """Errors: DataError naming a Parquet file that cannot be read, or is Git's stand-in for one.

    `datasets` would say what is wrong with a file, but not with which. whole: read it to its end.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if files.index.reader != "parquet":
        return
    for name in names:
        try:
            with pq.ParquetFile(name) as parquet:
                for _ in parquet.iter_batches(_BATCH) if whole else ():
                    pass
        except (pa.ArrowException, OSError) as error:
            with open(name, "rb") as file:
                pointer = file.read(7) == b"version"
            raise DataError(
                f"{files.asked.by}: {name} cannot be read: {' '.join(str(error).split())}",
                "it is Git's stand-in for a large file: run  git lfs pull  there"
                if pointer
                else "it is damaged: remove it, and download it again",
            ) from error
