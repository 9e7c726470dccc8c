"""Files that are there whole or not at all, whoever is killed while writing them.

A file is written beside its place under a name of its own, flushed to the disk, and renamed over
its place. Readers see the old file or the new one; two writers of one name never mix; what a kill
leaves behind is a hidden `.NAME.PID-RANDOM.tmp` that every reader skips.

Flushing is what guards against a power cut: without it a renamed file may come back empty. The
folder itself is not flushed: a power cut may then take a whole new file away, which every reader
here understands as "not done yet", and it saves half of the time.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from saebench.errors import WriteError

_HINTS = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "your quota is used up: free some space, or choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ENOTDIR: "a part of that path is a file, not a folder: choose another",
    errno.EISDIR: "there is a folder of that name: choose another",
    errno.EEXIST: "there is a file of that name where a folder should be: choose another",
    errno.ENOENT: "the folder is not there (any more): create it, or choose another",
}


def unwritable(path: Path, error: OSError) -> WriteError:
    """The error to raise when writing `path` met `error`."""
    reason = error.strerror or str(error)
    return WriteError(f"{path} cannot be written: {reason}", _HINTS.get(error.errno or 0, ""))


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """A temporary path in the same folder, to be written and closed inside the block.

    When the block ends it is flushed and takes the place of `path`; when the block raises it is
    removed and `path` stays as it was. `sync=False` leaves out the flush, for files whose loss in
    a power cut costs little and whose damage is seen when they are read. Errors: WriteError.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        if sync:
            _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        _forget([temporary])


def write_bytes(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a whole file, atomically. Errors: WriteError."""
    with replacing(path, sync=sync) as temporary:
        temporary.write_bytes(data)


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write several files; they appear in the order given, and none before all are on the disk.

    So the last one's presence says that the others are there. They are flushed side by side, which
    costs one flush's time instead of one for each. Errors: WriteError.
    """
    temporaries = {path: temporary_beside(path) for path in files}
    path = Path()
    try:
        for path, data in files.items():
            temporaries[path].write_bytes(data)
        with ThreadPoolExecutor(max_workers=len(files)) as pool:
            list(pool.map(_flush, temporaries.values()))
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        _forget(temporaries.values())


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it. Errors: WriteError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None


def check_folder(folder: Path) -> None:
    """See that a folder can be made and written to, before hours of work; it is left as it was.

    Errors: WriteError.
    """
    made: list[Path] = []
    try:
        for one in (*reversed(folder.parents), folder):
            if not one.is_dir():
                one.mkdir()
                made.append(one)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable(folder, error) from None
    finally:
        for one in reversed(made):
            with suppress(OSError):  # somebody else may have begun to use it
                one.rmdir()


def remove_leftovers(folder: Path, older_than_s: float = 86_400.0) -> None:
    """Remove temporary files and folders of killed writers, once nobody touched them for a day."""
    limit = time.time() - older_than_s
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process is sweeping too
            if path.stat().st_mtime < limit:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def temporary_beside(path: Path) -> Path:
    """A hidden name in the same folder that no other writer uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _forget(temporaries: Iterable[Path]) -> None:
    for temporary in temporaries:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
