"""Listings of large datasets, remembered between runs, so that a second start takes seconds.

`<store>/listings/<hash of what was listed>.npz` holds named arrays, and the modification times and
sizes of the folders or shards they were made from. A listing is used while none of these differs.
A damaged one is made anew: the zip's checksums tell, and beside the key it keeps what its arrays
are called and how large they are. Where nothing can be written the next run lists again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from saebench import paths
from saebench.atomic import replacing
from saebench.data.texts import Texts
from saebench.errors import WriteError
from saebench.identity import content_hash

VERSION = 1
WORTH = 5_000  # rows; below, listing again takes no time
SETTLED = 2.0  # seconds; what changed later than that may change again within one clock tick
THREADS = 16  # a network file system answers many questions at once

Arrays = dict[str, np.ndarray]
Stamp = tuple[int, int]  # modification time in nanoseconds, size in bytes (0 for a folder)


@dataclass(frozen=True)
class Listed:
    """What listing found. watched: path -> its stamp, taken before it was read."""

    arrays: Arrays
    watched: Mapping[str, Stamp]
    rows: int


def remembered(what: Mapping[str, Any], make: Callable[[], Listed]) -> Arrays:
    """The arrays of `what` (all that decides how it is listed), from the last run or made now."""
    key = content_hash({"version": VERSION, **what})
    path = paths.user_store() / "listings" / f"{key[:32]}.npz"
    if (known := _read(path, key)) is not None:
        return known
    start = time.time()
    made = make()
    newest = max((stamp[0] for stamp in made.watched.values()), default=0)
    if made.rows >= WORTH and newest < (start - SETTLED) * 1e9:
        watched = Texts.of(made.watched)
        stamps = np.array(list(made.watched.values()), dtype=np.int64).reshape(-1, 2)
        about = np.frombuffer(json.dumps(_about(key, made.arrays)).encode(), dtype=np.uint8)
        own = {"_about": about, "_watched": watched.data, "_stamps": stamps}
        with suppress(OSError, WriteError):  # it would only have saved time
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, sync=False) as temporary, temporary.open("wb") as file:
                np.savez(file, **own, **made.arrays)  # type: ignore[arg-type]
    return made.arrays


def stamp_of(path: str) -> Stamp:
    """A folder's or file's stamp. Errors: OSError."""
    found = os.stat(path)
    return found.st_mtime_ns, 0 if os.path.isdir(path) else found.st_size


def stamps_of(watched: Sequence[str]) -> np.ndarray:
    """[n 2] int64, -1 for what is not there."""

    def stamp(path: str) -> Stamp:
        try:
            return stamp_of(path)
        except OSError:
            return -1, -1

    with ThreadPoolExecutor(THREADS) as pool:
        return np.array(list(pool.map(stamp, watched)), dtype=np.int64).reshape(-1, 2)


def _about(key: str, arrays: Arrays) -> dict[str, Any]:
    # A checksum is compared once all of an array is read: one that says it is smaller escapes it.
    return {"key": key, "sizes": {name: array.nbytes for name, array in sorted(arrays.items())}}


def _read(path: os.PathLike[str], key: str) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays.pop("_about").tobytes())
        watched, stamps = Texts(arrays.pop("_watched")), arrays.pop("_stamps")
        same = about == _about(key, arrays) and np.array_equal(stamps_of(watched), stamps)
    except Exception:  # zipfile's, zlib's and NumPy's parsers raise whatever they meet in damage
        return None
    return arrays if same else None
