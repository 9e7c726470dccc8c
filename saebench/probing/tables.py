"""Features and codes of a chunk of train images as tables of the store, written as they come.

    probe_features     place [n] int64, x [n f] float32: clean features, or those of reconstructions
    probe_code_counts  place [n] int64, count [n] int64: how many latents are not zero
    probe_codes        latent [m] int32, value [m] float32: those, image after image

place: where in the chunk an image stands; what is not there did not decode. The codes' identity has
a hash of their counts, so that the two always belong together, also where two runs write at once.
A finished table holds no file open: it is mapped when its rows are asked for. Where the store
cannot be written, tables are kept in memory, as many as have room there.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from saebench.entries import entry_id
from saebench.errors import WriteError
from saebench.shards import open_shards
from saebench.store import Store

FEATURES, COUNTS, CODES = "probe_features", "probe_code_counts", "probe_codes"
WAITING_BYTES = 1 << 30  # what all writers hold back together, until a file is full
SHARD_BYTES = (8 << 20, 64 << 20)  # the least and the most of a file
MEMORY_BYTES = 4 << 30  # of all tables, where the store cannot be written

Shard = Mapping[str, np.ndarray]


class Writer(Protocol):
    """Takes rows; what they become is there whole or not at all."""

    def append(self, arrays: Shard) -> None: ...
    def becomes(self, fields: Mapping[str, Any], notes: Mapping[str, Any]) -> None: ...
    def complete(self) -> None: ...
    def drop(self) -> None: ...


@dataclass
class Tables:
    """The tables of a store; each is checked once, when it is first read in this process."""

    store: Store
    held: dict[str, list[Shard]] = field(default_factory=dict)  # by id, where it is not writable
    given_up: WriteError | None = None
    _sound: set[str] = field(default_factory=set)

    def find(self, kind: str, fields: Mapping[str, Any]) -> Iterable[Shard] | None:
        """The shards of a table, as read-only views of its files; None where it is not there.

        A damaged table is named in a warning, and is not there.
        """
        id = entry_id(kind, fields)
        if id in self.held:
            return self.held[id]
        folder = self.store.root / "shards" / kind / id
        try:
            found = open_shards(folder, verify=id not in self._sound)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._sound.discard(id)
            self.store.distrust(folder, error)
            return None
        if found is not None:
            self._sound.add(id)
        return found

    def writer(self, kind: str, fields: Mapping[str, Any], row_bytes: int, n: int) -> Writer:
        """A writer of a table, one of about n that write at once. Errors: WriteError."""
        if self.given_up is not None:
            return _Held(self, kind, dict(fields))
        least, most = SHARD_BYTES
        rows = max(1, min(max(WAITING_BYTES // n, least), most) // row_bytes)
        return self.store.shard_writer(kind, fields, rows=rows).__enter__()

    def complete(self, kind: str, writer: Writer | None, fields: Mapping[str, Any]) -> None:
        """Complete what was written, if anything was, under these fields. Errors: WriteError."""
        if writer is not None:
            writer.becomes(fields, {})
            writer.complete()
            self._sound.add(entry_id(kind, fields))

    def give_up(self, error: WriteError) -> None:
        """Keep tables in memory from now on, and say so. Errors: WriteError, the second time."""
        if self.given_up is not None:
            raise error
        self.given_up = error
        hint = "free some space, or set SAEBENCH_STORE to a folder on another disk"
        warnings.warn(
            f"features for probes are kept in memory: {error.what}\n  → {hint}", stacklevel=2
        )

    @property
    def held_bytes(self) -> int:
        """What all tables take that are kept in memory."""
        return sum(a.nbytes for table in self.held.values() for s in table for a in s.values())


@dataclass
class _Held:
    """Writes a table that is kept in memory."""

    tables: Tables
    kind: str
    fields: Mapping[str, Any]
    pieces: list[Shard] = field(default_factory=list)
    n_bytes: int = 0

    def append(self, arrays: Shard) -> None:
        self.pieces.append({name: array.copy() for name, array in arrays.items()})
        self.n_bytes += sum(array.nbytes for array in arrays.values())
        if self.n_bytes + self.tables.held_bytes > MEMORY_BYTES:
            assert self.tables.given_up is not None
            raise WriteError(
                f"{self.tables.given_up.what}, and the features of these images take more than "
                f"{MEMORY_BYTES >> 30} GiB of memory",
                "set SAEBENCH_STORE to a folder that can be written, or give fewer images with "
                "--train-limit",
            )

    def becomes(self, fields: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        self.fields = dict(fields)

    def complete(self) -> None:
        whole = {k: np.concatenate([piece[k] for piece in self.pieces]) for k in self.pieces[0]}
        self.tables.held[entry_id(self.kind, self.fields)] = [whole]

    def drop(self) -> None:
        self.pieces = []


class FeatureWriter:
    """Writes the features of a chunk's images, one of n such writers. Errors of all: WriteError."""

    def __init__(self, tables: Tables, fields: Mapping[str, Any], n: int = 1) -> None:
        self.tables, self.fields, self.n = tables, fields, n
        self._writer: Writer | None = None

    def append(self, places: np.ndarray, x_bf: np.ndarray) -> None:
        """Add the images at these places."""
        if self._writer is None:
            row_bytes = 8 + x_bf[:1].nbytes
            self._writer = self.tables.writer(FEATURES, self.fields, row_bytes, self.n)
        self._writer.append({"place": places.astype(np.int64), "x": x_bf})

    def complete(self, fields: Mapping[str, Any]) -> None:
        """Put it where it is found under `fields`; nothing of no images."""
        self.tables.complete(FEATURES, self._writer, fields)
        self._writer = None

    def drop(self) -> None:
        """Leave nothing behind."""
        if self._writer is not None:
            self._writer.drop()
            self._writer = None


class CodesWriter:
    """Writes the codes of a chunk's images, one of n such writers. Errors of all: WriteError."""

    def __init__(self, tables: Tables, fields: Mapping[str, Any], n: int = 1) -> None:
        self.tables, self.fields, self.n = tables, fields, n
        self._counts: Writer | None = None
        self._codes: Writer | None = None
        self._digest = hashlib.sha256()

    def append(
        self, places: np.ndarray, counts: np.ndarray, latents: np.ndarray, values: np.ndarray
    ) -> None:
        """Add the images at these places: counts [b] of all latents and values [m]."""
        counts = counts.astype(np.int64)
        if self._counts is None:
            self._counts = self.tables.writer(COUNTS, self.fields, 16, self.n)
        self._counts.append({"place": places.astype(np.int64), "count": counts})
        self._digest.update(counts.tobytes())
        if not len(latents):
            return
        if self._codes is None:
            self._codes = self.tables.writer(CODES, self.fields, 8, self.n)
        self._codes.append({"latent": latents.astype(np.int32), "value": values})

    def complete(self, fields: Mapping[str, Any]) -> None:
        """Put them where they are found under `fields`: the counts last, which tell of them."""
        self.tables.complete(CODES, self._codes, _of_counts(fields, self._digest))
        self._codes = None
        self.tables.complete(COUNTS, self._counts, fields)
        self._counts = None

    def drop(self) -> None:
        """Leave nothing behind."""
        for writer in (self._codes, self._counts):
            if writer is not None:
                writer.drop()
        self._codes = self._counts = None


def _of_counts(fields: Mapping[str, Any], digest: Any) -> dict[str, Any]:
    return {**fields, "counts": digest.hexdigest()}


@dataclass(frozen=True)
class FeatureTable:
    """places: [n] int64, ascending."""

    places: np.ndarray
    shards: Iterable[Shard]

    @property
    def parts(self) -> list[np.ndarray]:
        """[n_i f] float32 views of the files, n rows in all."""
        return [shard["x"] for shard in self.shards]

    @classmethod
    def find(cls, tables: Tables, fields: Mapping[str, Any]) -> FeatureTable | None:
        """The table of these fields, if it is there."""
        shards = tables.find(FEATURES, fields)
        if shards is None:
            return None
        places = np.concatenate([shard["place"] for shard in shards])
        return cls(places, shards)


@dataclass(frozen=True)
class CodesTable:
    """counts: [n] int64 of the images at `places`, ascending."""

    places: np.ndarray
    counts: np.ndarray
    shards: Iterable[Shard]

    @property
    def parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(latent, value) [m_i] views of the files, image after image."""
        return [(shard["latent"], shard["value"]) for shard in self.shards]

    @classmethod
    def find(cls, tables: Tables, fields: Mapping[str, Any]) -> CodesTable | None:
        """The tables of these fields, if both are there."""
        shards = tables.find(COUNTS, fields)
        if shards is None:
            return None
        places = np.concatenate([shard["place"] for shard in shards])
        counts = np.concatenate([shard["count"] for shard in shards])
        codes: Iterable[Shard] | None = []
        if counts.any():
            codes = tables.find(CODES, _of_counts(fields, hashlib.sha256(counts.tobytes())))
        if codes is None:
            return None
        return cls(places, counts, codes)
