"""Long tables in the store: arrays that share their rows, cut into files of equally many rows.

Pooled features of a whole split, or activations, are written as they come, in flat memory, and
read back as views of the files. Every shard but the last has exactly `rows` rows, whatever pieces
were appended.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from saebench.atomic import remove_leftovers, temporary_beside, unwritable, write_bytes
from saebench.entries import (
    MANIFEST,
    damage,
    entry_id,
    file_record,
    manifest_bytes,
    manifest_of,
    read_manifest,
)
from saebench.tensors import memory_map, to_bytes

ROWS = 65_536  # rows of a shard: 192 MiB of float32 at width 768


@dataclass(frozen=True)
class Shards:
    """A finished table. Iterating gives each shard as read-only views, name -> [rows …]."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def id(self) -> str:
        return self.manifest["id"]

    @property
    def n_rows(self) -> int:
        return sum(record["rows"] for record in self.manifest["files"].values())

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for name in sorted(self.manifest["files"]):
            yield memory_map(self.folder / name)


def open_shards(folder: Path, *, verify: bool = True) -> Shards | None:
    """The table in an entry's folder; None where there is none.

    `verify` reads all of it once and compares hashes. Errors: ValueError when it is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    if verify and (problem := damage(folder, manifest)):
        raise ValueError(problem)
    return Shards(folder, manifest)


class ShardWriter:
    """Writes one table below `parent`; used as a context manager, which completes it.

        with ShardWriter(parent, "pooled", fields) as writer:
            writer.append({"x": x_bd, "label": label_b})

    Nothing is to be seen of it until it is complete: it is written into a folder of its own, with
    the manifest last, which is then renamed. An exception in the block drops it.
    """

    def __init__(
        self, parent: Path, kind: str, fields: Mapping[str, Any], *, rows: int = ROWS
    ) -> None:
        if rows < 1:
            raise ValueError(f"a shard of {rows} rows")
        self.kind, self.fields, self.rows = kind, dict(fields), rows
        self.folder = parent / entry_id(kind, fields)
        self._temporary = temporary_beside(self.folder)
        self._files: dict[str, dict[str, Any]] = {}
        self._waiting: list[dict[str, np.ndarray]] = []
        self._n_waiting = 0
        self._form: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._notes: dict[str, Any] = {}

    def __enter__(self) -> ShardWriter:
        try:
            self._temporary.mkdir(parents=True)
        except OSError as error:
            raise unwritable(self._temporary, error) from error
        remove_leftovers(self.folder.parent)
        return self

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add rows: arrays of one length, of the same names, dtypes and widths every time.

        Errors: ValueError for arrays that do not fit, WriteError.
        """
        form = {name: (array.dtype, array.shape[1:]) for name, array in arrays.items()}
        lengths = {len(array) for array in arrays.values()}
        if len(lengths) != 1 or (self._form and form != self._form):
            shapes = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
            raise ValueError(f"these rows do not fit those before them: {shapes}")
        self._form = form
        # A copy: the caller may fill the same buffer again.
        self._waiting.append({name: array.copy() for name, array in arrays.items()})
        self._n_waiting += lengths.pop()
        while self._n_waiting >= self.rows:
            self._write(self.rows)

    def _write(self, n: int) -> None:
        whole = {name: np.concatenate([w[name] for w in self._waiting]) for name in self._form}
        self._waiting = [{name: array[n:] for name, array in whole.items()}]
        self._n_waiting -= n
        data = to_bytes({name: array[:n] for name, array in whole.items()})
        name = f"{len(self._files):05d}.safetensors"
        write_bytes(self._temporary / name, data)
        self._files[name] = file_record(data, rows=n)

    def becomes(self, fields: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Complete it under these fields, whatever it was begun with, and with notes beside them.

        For what only the rows themselves tell. The notes stand in the manifest.
        """
        self.fields, self._notes = dict(fields), dict(notes)
        self.folder = self.folder.parent / entry_id(self.kind, fields)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.complete()
        else:
            self.drop()

    def drop(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    def complete(self) -> None:
        """Put the table in its place. Errors: WriteError, ValueError for one without rows."""
        try:
            self._complete()
        finally:
            self.drop()

    def _complete(self) -> None:
        if self._n_waiting:
            self._write(self._n_waiting)
        if not self._files:
            raise ValueError(f"a table of kind '{self.kind}' without rows")
        manifest = manifest_of(self.kind, self.fields, self._files)
        if self._notes:
            manifest["notes"] = self._notes
        write_bytes(self._temporary / MANIFEST, manifest_bytes(manifest))
        try:
            if not self._is_there():
                shutil.rmtree(self.folder, ignore_errors=True)
                self._temporary.rename(self.folder)
        except OSError as error:
            # Another process may have put the same table there in between.
            if not self._is_there():
                raise unwritable(self.folder, error) from error

    def _is_there(self) -> bool:
        try:
            return open_shards(self.folder) is not None
        except (ValueError, KeyError, TypeError):
            return False
