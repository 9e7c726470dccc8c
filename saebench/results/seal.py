"""Parquet files that carry the sha256 of themselves, and are plain Parquet to everybody else.

    PAR1 | pages | sha256 of all other bytes (32) | footer | length of the footer (4) | PAR1

Parquet's own checksums cover its pages but not its footer, where one flipped bit can move a column.
Readers find the pages by the offsets that the footer gives, so that bytes between the last page
and the footer are never looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from saebench.errors import ResultsError

_DIGEST = 32  # bytes of a sha256
_TAIL = 8  # length of the footer, and PAR1


class DamagedFile(ResultsError):
    """A file of a results folder that is not as it was written: truncated, altered, foreign."""


def parquet_bytes(table: pa.Table, metadata: Mapping[str, str] | None = None) -> bytes:
    """A table, and more metadata of its schema, as the bytes of a sealed Parquet file."""
    if metadata:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    footer = _footer(data)
    return data[:footer] + sha256(data).digest() + data[footer:]


def read_parquet(path: Path) -> pa.Table:
    """The table in a sealed file. Errors: DamagedFile, FileNotFoundError."""
    data = path.read_bytes()
    if not _is_sealed(data):
        raise DamagedFile(f"{path} is damaged: it is not as it was written")
    # Many small files: threads would cost more than they give.
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def is_whole(path: Path) -> bool:
    """Whether a sealed file is there, every bit as it was written."""
    try:
        return _is_sealed(path.read_bytes())
    except OSError:
        return False


def _footer(data: bytes) -> int:
    """Where the footer begins."""
    return len(data) - _TAIL - int.from_bytes(data[-_TAIL : -_TAIL + 4], "little")


def _is_sealed(data: bytes) -> bool:
    if len(data) < _TAIL + _DIGEST:
        return False
    footer = _footer(data)
    if footer < _DIGEST:
        return False
    digest = sha256(data[: footer - _DIGEST])
    digest.update(memoryview(data)[footer:])
    return digest.digest() == data[footer - _DIGEST : footer]
