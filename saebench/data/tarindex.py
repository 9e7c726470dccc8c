"""Where the members of a tar file are: its headers are read, and nothing else.

A tar file is a sequence of 512-byte headers, each followed by its member's bytes, padded to 512;
two blocks of zeros end it (POSIX.1-1988 ustar, with pax and GNU long names). Python's `tarfile`
makes an object of 25 attributes of every header; an ImageNet in shards has 3.8 million of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zlib import adler32

from saebench.errors import DataError

BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_HARD, _SYMBOLIC = b"1", b"2"
_ZEROS = bytes(BLOCK)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class Member(NamedTuple):
    """A file in a tar. start: the member's first bytes, up to 512 of them.

    link: what it is a link to, where the tar does not hold the bytes: of a symbolic link, or of a
    hard link to a file that is not in it. Such a member has no bytes.
    """

    name: str
    offset: int
    size: int
    start: bytes
    link: str = ""


def members(path: Path) -> Iterator[Member]:
    """The files of a tar, in order; after them its hard links, each with the bytes it stands for.

    Errors: DataError for a tar that is compressed, truncated or damaged, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        length = os.fstat(descriptor).st_size
        links: dict[str, str] = {}
        yield from _members(path, descriptor, length, links)
        if links:  # few tars have any, and a name for every member would fill the memory
            yield from _linked(links, _members(path, descriptor, length, {}))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _linked(links: dict[str, str], files: Iterator[Member]) -> Iterator[Member]:
    """A member for each hard link, name -> target. A target may be a link itself."""
    wanted = set(links.values())
    there = {member.name: member for member in files if member.name in wanted}
    for name, target in links.items():
        passed = {name}
        while target not in there and target in links and target not in passed:
            passed.add(target)
            target = links[target]
        if target in there:
            yield there[target]._replace(name=name)
        else:
            yield Member(name, 0, 0, b"", target)


def _members(path: Path, descriptor: int, length: int, links: dict[str, str]) -> Iterator[Member]:
    """All but the hard links, which go into `links`: name -> target."""
    at = 0
    long_name: str | None = None  # what a header before said of this member
    long_size: int | None = None
    long_target: str | None = None
    while True:
        both = os.pread(descriptor, 2 * BLOCK, at)  # the header, and what a small member holds
        header = both[:BLOCK]
        if len(header) < BLOCK:
            raise _damaged(path, at, header) if at == 0 else _truncated(path, "it has no end mark")
        if header == _ZEROS:
            return
        if not _sums_up(header):
            raise _damaged(path, at, header)
        kind, size = header[156:157], _number(header[124:136], path, at)
        size = size if long_size is None else long_size
        size = 0 if kind == _HARD else size  # some write the target's, and no bytes follow
        start = at + BLOCK
        at = start + -(-size // BLOCK) * BLOCK
        if start + size > length:
            raise _truncated(path, f"it ends within '{long_name or _name(header)}'")
        if kind == b"L":
            long_name = os.pread(descriptor, size, start).rstrip(b"\0").decode(errors="replace")
        elif kind == b"K":
            long_target = os.pread(descriptor, size, start).rstrip(b"\0").decode(errors="replace")
        elif kind == b"x":
            said = _pax(os.pread(descriptor, size, start))
            long_name = said.get("path", long_name)
            long_target = said.get("linkpath", long_target)
            long_size = int(said["size"]) if "size" in said else long_size
        elif kind == b"g":
            pass  # of all members
        else:
            name, target = long_name or _name(header), long_target or _text(header[157:257])
            long_name = long_size = long_target = None
            if kind == _HARD:
                links[name] = target
            elif kind == _SYMBOLIC:
                yield Member(name, 0, 0, b"", target)
            elif kind in _REGULAR and not name.endswith("/"):
                yield Member(name, start, size, both[BLOCK : BLOCK + min(size, BLOCK)])


def _sums_up(header: bytes) -> bool:
    """Whether its checksum is right: all bytes added up, those of the checksum as blanks."""
    try:
        told = int(header[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    blank = header[:148] + b" " * 8 + header[156:]
    # Adler-32's low half is 1 + the sum, as long as that is below 65521: ten times Python's sum.
    return told == (adler32(blank[:256]) & 0xFFFF) + (adler32(blank[256:]) & 0xFFFF) - 2


def _number(digits: bytes, path: Path, at: int) -> int:
    if digits[0] & 0x80:  # GNU: of 8 GiB and more, in binary
        return int.from_bytes(digits[1:], "big")
    try:
        return int(digits.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise _damaged(path, at, b"") from None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return name.decode(errors="replace")


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="replace")


def _pax(data: bytes) -> dict[str, str]:
    """Records `<length> <key>=<value>\\n`, where length counts all of the record."""
    said = {}
    while data:
        length = int(data.split(b" ", 1)[0])
        key, _, value = data[:length].split(b" ", 1)[1].partition(b"=")
        said[key.decode()] = value[:-1].decode(errors="replace")
        data = data[length:]
    return said


def _truncated(path: Path, where: str) -> DataError:
    return DataError(f"{path} is truncated: {where}", "download or write it again")


def _damaged(path: Path, at: int, header: bytes) -> DataError:
    for magic, kind in _COMPRESSED.items():
        if at == 0 and header.startswith(magic):
            return DataError(
                f"{path} is compressed with {kind}, and single images cannot be read out of it",
                "decompress it; images hardly shrink",
            )
    if at == 0:
        what = "is not a tar file" if header else "is empty"
    else:
        what = f"is damaged at byte {at}"
    return DataError(f"{path} {what}", "download or write it again")
