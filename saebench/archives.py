"""Zip archives, their members held against the bytes that are there before anything is read."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO

from saebench.pickles import Damaged

ZIP = b"PK\x03\x04"  # how an archive with members begins

_LOCAL_HEADER = 30  # bytes before a member's name


def members(archive: Path | BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by name. Errors: Damaged (truncated, two of one name)."""
    try:
        with zipfile.ZipFile(archive) as opened:
            found = opened.infolist()
    except Exception as error:  # what a damaged directory raises is not documented
        raise Damaged(str(error) or type(error).__name__) from None
    named = {info.filename: info for info in found}
    if len(named) != len(found):
        raise Damaged("an archive with two members of one name")
    return named


def stored_at(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin that is not compressed.

    Errors: Damaged where the archive's directory and the member's own header disagree.
    """
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise Damaged("a compressed archive, which torch.save does not write")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    n_name = int.from_bytes(header[26:28], "little")
    n_extra = int.from_bytes(header[28:30], "little")
    same = file.read(n_name) == info.orig_filename.encode("utf-8")
    if not header.startswith(ZIP) or int.from_bytes(header[8:10], "little") or not same:
        raise Damaged(f"an archive whose directory is wrong about {info.filename!r:.80}")
    return info.header_offset + _LOCAL_HEADER + n_name + n_extra
