"""Zip archives, their members held against the bytes that are there before anything is read."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO

from saebench.plainvalues import Damaged, Unsupported

ZIP = b"PK\x03\x04"  # how an archive with members begins

MOST_MEMBERS = 20_000  # a training checkpoint has some thousands, one for each tensor
_LARGEST_DIRECTORY = 4 * 2**20  # bytes: some hundred for a member
_LOCAL_HEADER = 30  # bytes before a member's name


class _Directory:
    """A file of which only so much is read at once: `zipfile` reads a directory in one piece."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, n: int = -1) -> bytes:
        if n > _LARGEST_DIRECTORY:
            raise Unsupported(f"an archive with a directory of {n:,} bytes")
        return self.file.read(n)


def members(archive: Path | BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by name.

    Errors: Damaged (truncated, two of one name), Unsupported (too many), OSError.
    """
    if isinstance(archive, Path):
        with archive.open("rb") as file:
            return members(file)
    try:
        with zipfile.ZipFile(_Directory(archive)) as opened:
            found = opened.infolist()
    except Unsupported:
        raise
    except Exception as error:  # what a damaged directory raises is not documented
        raise Damaged(str(error) or type(error).__name__) from None
    if len(found) > MOST_MEMBERS:
        raise Unsupported(f"an archive of {len(found):,} members")
    named = {info.filename: info for info in found}
    if len(named) != len(found):
        raise Damaged("an archive with two members of one name")
    return named


def stored_at(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin that is not compressed.

    Errors: Damaged where the archive's directory and the member's own header disagree,
    Unsupported for one that is compressed.
    """
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise Unsupported("a compressed archive, which torch.save does not write")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    n_name = int.from_bytes(header[26:28], "little")
    n_extra = int.from_bytes(header[28:30], "little")
    same = file.read(n_name) == info.orig_filename.encode("utf-8")
    if not header.startswith(ZIP) or int.from_bytes(header[8:10], "little") or not same:
        raise Damaged(f"an archive whose directory is wrong about {info.filename!r:.80}")
    return info.header_offset + _LOCAL_HEADER + n_name + n_extra
