"""Every image file below a folder, as fast as the file system lists them.

Folders are read by `os.scandir`, several at once, and no file is asked for more than its name.
Links to folders are followed. One that leads back to a folder it lies in, by itself or by way of
other links, is an error that names it: what lies in a circle would be listed again and again, under
other names.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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


class _Folder(NamedTuple):
    path: str  # below the top
    left: tuple[str, ...] = ()  # the real folders that were left by links on the way here


def scan(top: Path) -> Scan:
    """Errors: DataError for a folder that cannot be read, or a link to a folder it lies in."""
    found = Scan()
    below = _read(str(top), _Folder(""), found)
    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(lambda folder: _walk(str(top), folder), below))
    for part in parts:
        found.folders.update(part.folders)
        found.stamps.update(part.stamps)
        found.skipped.update(part.skipped)
    found.folders = dict(sorted(found.folders.items()))
    return found


def _walk(top: str, first: _Folder) -> Scan:
    found, todo = Scan(), [first]
    while todo:
        todo += _read(top, todo.pop(), found)
    return found


def _read(top: str, folder: _Folder, found: Scan) -> list[_Folder]:
    """Take one folder's images in, and return the folders below it."""
    path = os.path.join(top, folder.path) if folder.path else top
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
                    left = folder.left
                    if entry.is_symlink():
                        left = (*left, os.path.realpath(path))
                        _check_circle(entry.path, left)
                    below.append(_Folder(f"{folder.path}/{name}" if folder.path else name, left))
                elif suffix in SUFFIXES:
                    names.append(name)
                else:
                    found.skipped[suffix or "no suffix"] += 1
    except OSError as error:
        raise DataError(
            f"{error.filename or path} cannot be read: {error.strerror or error}",
            "remove the link, or let it name what it is for"
            if error.errno == errno.ELOOP
            else "mend its permissions, or the file system it lies on",
        ) from error
    if names:
        names.sort()
        found.folders[folder.path] = names
    return sorted(below)


def _check_circle(link: str, left: tuple[str, ...]) -> None:
    """left: the real folders that links were followed from, this one's last. Errors: DataError."""
    target = os.path.realpath(link)
    if any(one == target or one.startswith(target.rstrip(os.sep) + os.sep) for one in left):
        raise DataError(
            f"{link} is a link to a folder it lies in ({target})",
            "remove the link: following it would never end",
        )
