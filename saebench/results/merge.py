"""From the rows of many units to one table, and whether a merged table is up to date.

The merged table carries a fingerprint of the files that it was made from (name, inode, size and
time of each), so that a merge with nothing new costs one read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pyarrow as pa

from saebench.results.schema import arrow_schema
from saebench.results.seal import DamagedFile, parquet_bytes, read_parquet
from saebench.results.table import read_rows

ORDER = ("backbone", "dataset", "site", "tokens", "sae", "task", "unit_id")
"""How units follow each other; the rows of one stay in the order of its task."""

Listing = dict[str, tuple[int, int, int]]

_MERGED_FROM = "saebench_merged_from"


def listing(folder: Path) -> Listing:
    """unit id -> (inode, size, time) of its rows: changes whenever one of them is written."""
    files = {}
    for path in sorted(folder.glob("*.parquet")):
        with suppress(FileNotFoundError):
            stat = path.stat()
            files[path.stem] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return files


def gather(folder: Path, unit_ids: Iterable[str]) -> tuple[pa.Table, dict[str, DamagedFile]]:
    """All rows in their fixed order, and the units whose file is damaged.

    Errors: ResultsError for rows of a newer schema.
    """
    tables, damaged = [], {}
    for unit_id in unit_ids:
        path = folder / f"{unit_id}.parquet"
        try:
            table = read_rows(path)
            if set(table.column("unit_id").to_pylist()) != {unit_id}:
                raise DamagedFile(f"{path} is damaged: it holds rows of another unit")
        except FileNotFoundError:  # removed a moment ago by another run
            continue
        except DamagedFile as error:
            error.hint = "run the same command again: it is measured anew"
            damaged[unit_id] = error
            continue
        tables.append(table)
    tables.sort(key=lambda table: [table.column(name)[0].as_py() for name in ORDER])
    whole = pa.concat_tables(tables) if tables else arrow_schema().empty_table()
    return whole.combine_chunks(), damaged


def merged_bytes(table: pa.Table, files: Listing) -> bytes:
    """A merged table as it is written. files: what it was made from."""
    return parquet_bytes(table, {_MERGED_FROM: _fingerprint(files)})


def merged(path: Path, files: Listing) -> pa.Table | None:
    """The merged table, if it is there, undamaged, and made from exactly these files."""
    try:
        table = read_parquet(path)
    except (OSError, DamagedFile):
        return None
    metadata: Mapping[bytes, bytes] = table.schema.metadata or {}
    fresh = metadata.get(_MERGED_FROM.encode()) == _fingerprint(files).encode()
    return table if fresh and table.schema.equals(arrow_schema()) else None


def _fingerprint(files: Listing) -> str:
    return sha256(repr(sorted(files.items())).encode()).hexdigest()
