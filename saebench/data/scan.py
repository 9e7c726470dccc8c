"""Every image file below a folder, as fast as the file system lists them.

Folders are read by `os.scandir`, several at once, and no file is asked for more than its name.
"""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from saebench.data.listings import THREADS, Stamp
from saebench.errors import DataError

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
"""What ends the names of image files, whatever the case."""
_NOT_OURS = frozenset(("__MACOSX", "@eaDir"))  # made by archivers and file servers


@dataclass
class Scan:
    """folders: path below the top (`''` is the top) -> names of its images, both sorted.

    stamps: folder, as a path to open -> when it was last changed. skipped: suffix -> files left.
    """

    folders: dict[str, list[str]] = field(default_factory=dict)
    stamps: dict[str, Stamp] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)


def scan(top: Path) -> Scan:
    """Errors: DataError for a folder that cannot be read, or a link to a folder it lies in."""
    found = Scan()
    below = _read(str(top), "", found)
    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(lambda name: _walk(str(top), name), below))
    for part in parts:
        found.folders.update(part.folders)
        found.stamps.update(part.stamps)
        found.skipped.update(part.skipped)
    found.folders = dict(sorted(found.folders.items()))
    return found


def _walk(top: str, first: str) -> Scan:
    found, todo = Scan(), [first]
    while todo:
        todo += _read(top, todo.pop(), found)
    return found


def _read(top: str, folder: str, found: Scan) -> list[str]:
    """Take one folder's images in, and return the folders below it, as paths below the top."""
    path = os.path.join(top, folder) if folder else top
    names, below = [], []
    try:
        found.stamps[path] = (os.stat(path).st_mtime_ns, 0)
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                suffix = os.path.splitext(name)[1].lower()
                if entry.is_dir():
                    if name in _NOT_OURS:
                        continue
                    if entry.is_symlink() and _encloses(entry.path, path):
                        raise DataError(
                            f"{entry.path} is a link to a folder it lies in",
                            "remove the link: following it would never end",
                        )
                    below.append(f"{folder}/{name}" if folder else name)
                elif suffix in SUFFIXES:
                    names.append(name)
                else:
                    found.skipped[suffix or "no suffix"] += 1
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}",
            "mend its permissions, or the file system it lies on",
        ) from error
    if names:
        names.sort()
        found.folders[folder] = names
    return sorted(below)


def _encloses(outer: str, inner: str) -> bool:
    real, within = os.path.realpath(outer), os.path.realpath(inner)
    return within == real or within.startswith(real.rstrip(os.sep) + os.sep)
