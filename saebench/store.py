"""Content-addressed artifacts: what had to be fitted or computed once, and is the same for all.

An artifact is a few named arrays under the hash of everything that can change them (its fields):
the means of a site, a PCA basis, a text classifier. It is checked whenever it is read; a damaged
one is built anew, with a warning. Where the store cannot be written, artifacts are kept in memory
for as long as this process runs.

    <root>/artifacts/<kind>/<id>/   data.safetensors, manifest.json   (saebench.entries)
    <root>/shards/<kind>/<id>/      00000.safetensors …, manifest.json  (saebench.shards)
    <root>/locks/                   so that two processes do not build the same thing
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saebench import paths
from saebench.atomic import unwritable, write_files
from saebench.entries import (
    MANIFEST,
    damage,
    entry_id,
    file_record,
    manifest_bytes,
    manifest_of,
    read_manifest,
)
from saebench.errors import WriteError
from saebench.shards import ROWS, Shards, ShardWriter, open_shards
from saebench.tensors import closed_map, from_bytes, to_bytes

_DATA = "data.safetensors"


@dataclass(frozen=True, eq=False)
class Artifact:
    """Named arrays, and the manifest that says what they are."""

    id: str
    arrays: dict[str, np.ndarray]
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """Something in the store that is not as its manifest says."""

    folder: Path
    what: str


class Store:
    """The artifacts and shards below `root`, by default the user's store (`SAEBENCH_STORE`)."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(root) if root is not None else paths.user_store()
        self._memory: dict[str, Artifact] = {}
        self._told = False
        self._sound: set[str] = set()  # ids of those that are mapped, once checked

    # Artifacts

    def get(
        self,
        kind: str,
        fields: Mapping[str, Any],
        build: Callable[[], Mapping[str, np.ndarray]],
        *,
        mapped: bool = False,
    ) -> Artifact:
        """The artifact of these fields, built if it is not there. mapped: as `find` has it.

        Of several processes that ask at once, one builds and the others wait for it.
        """
        if found := self.find(kind, fields, mapped=mapped):
            return found
        from filelock import FileLock

        locks = self.root / "locks"
        lock = FileLock(locks / f"{entry_id(kind, fields)}.lock")
        try:
            locks.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            return self._remember(kind, fields, build(), unwritable(locks, error))
        try:
            if found := self.find(kind, fields, mapped=mapped):
                return found
            built = self.put(kind, fields, build())
        finally:
            lock.release()
        again = self.find(kind, fields, mapped=True) if mapped else None
        return again or built

    def find(
        self, kind: str, fields: Mapping[str, Any], *, mapped: bool = False
    ) -> Artifact | None:
        """The artifact of these fields, every byte checked; None if it is not there.

        mapped: its arrays are read from their file as they are used, and take no memory.
        """
        id = entry_id(kind, fields)
        if id in self._memory:
            return self._memory[id]
        folder = self._artifact(kind, id)
        try:
            manifest = read_manifest(folder)
            if manifest is None:
                return None
            if mapped:
                if id not in self._sound and (problem := damage(folder, manifest)):
                    raise ValueError(problem)
                self._sound.add(id)
                return Artifact(id, closed_map(folder / _DATA), manifest)
            data = (folder / _DATA).read_bytes()
            if hashlib.sha256(data).hexdigest() != manifest["files"][_DATA]["sha256"]:
                raise ValueError(f"{_DATA} was altered")
        except (OSError, ValueError, KeyError) as error:
            self._sound.discard(id)
            self.distrust(folder, error)
            return None
        return Artifact(id, from_bytes(data), manifest)

    def has(self, kind: str, fields: Mapping[str, Any]) -> bool:
        """Whether `find` gives an artifact. It reads all of it."""
        return self.find(kind, fields) is not None

    def put(
        self, kind: str, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
    ) -> Artifact:
        """Keep an artifact, in memory alone (with one warning) where it cannot be written."""
        data = to_bytes(arrays)
        manifest = manifest_of(kind, fields, {_DATA: file_record(data)})
        folder = self._artifact(kind, manifest["id"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_files({folder / _DATA: data, folder / MANIFEST: manifest_bytes(manifest)})
        except OSError as error:
            return self._remember(kind, fields, arrays, unwritable(folder, error))
        except WriteError as error:
            return self._remember(kind, fields, arrays, error)
        return Artifact(manifest["id"], dict(arrays), manifest)

    def _remember(
        self,
        kind: str,
        fields: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        error: WriteError,
    ) -> Artifact:
        if not self._told:
            self._told = True
            hint = "set SAEBENCH_STORE to a folder that can be written, or the next run fits again"
            warnings.warn(f"artifacts are kept in memory: {error.what}\n  → {hint}", stacklevel=4)
        manifest = manifest_of(kind, fields, {_DATA: file_record(to_bytes(arrays))})
        artifact = Artifact(manifest["id"], dict(arrays), manifest)
        return self._memory.setdefault(artifact.id, artifact)

    def _artifact(self, kind: str, id: str) -> Path:
        return self.root / "artifacts" / kind / id

    # Shards

    def shard_writer(
        self, kind: str, fields: Mapping[str, Any], *, rows: int = ROWS
    ) -> ShardWriter:
        """A writer of the table of these fields, to be used in a `with` block."""
        return ShardWriter(self.root / "shards" / kind, kind, fields, rows=rows)

    def shards(self, kind: str, fields: Mapping[str, Any], *, verify: bool = True) -> Shards | None:
        """The table of these fields; None if it is not there or, with a warning, is damaged."""
        folder = self.root / "shards" / kind / entry_id(kind, fields)
        try:
            return open_shards(folder, verify=verify)
        except (OSError, ValueError) as error:
            warnings.warn(f"{folder} is built anew: {error}", stacklevel=2)
            return None

    @staticmethod
    def distrust(folder: Path, error: Exception) -> None:
        """Say that an entry is built anew, and make it none: then nobody is warned again."""
        warnings.warn(f"{folder} is built anew: {error}", stacklevel=4)
        if not isinstance(error, OSError):
            with suppress(OSError):
                (folder / MANIFEST).unlink()

    # The whole

    def entries(self, form: str = "*") -> Iterator[Path]:
        """The folders of all complete entries. form: `artifacts` or `shards`."""
        for path in sorted(self.root.glob(f"{form}/*/*/{MANIFEST}")):
            if not path.parent.name.startswith("."):
                yield path.parent

    def ids(self, kind: str = "*") -> list[str]:
        """The ids of all complete entries of a kind."""
        return [folder.name for folder in self.entries() if kind in ("*", folder.parent.name)]

    def verify(self) -> list[Problem]:
        """Read everything, and name what is not as its manifest says."""
        problems = []
        for folder in self.entries():
            try:
                what = damage(folder, read_manifest(folder) or {"files": {}})
            except (OSError, ValueError) as error:
                what = str(error)
            if what:
                problems.append(Problem(folder, what))
        return problems

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(file.stat().st_size for folder in self.entries() for file in folder.iterdir())
