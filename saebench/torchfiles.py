"""The tensors of what `torch.save` wrote, and of pickles of tensors, without any of their code.

    archive   a zip archive: data.pkl, and one member for each storage
    legacy    five pickles (magic number, version, system, value, keys), then the storages
    bare      a pickle of `pickle.dump`, in which each storage is a legacy file of its own

`torch.load(weights_only=True)` reads the first two. It builds kinds of tensors that weights never
are (sparse, quantised, without values), takes memory for whatever size a file claims, and cannot
look into the third. Here a tensor is a view of a storage that is in the file, whole, and no more:
the storages are read into their place, and nothing else of the file is held.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from saebench.archives import ZIP, members, stored_at
from saebench.pickles import Names, loads
from saebench.plainvalues import Damaged, Span, Unsupported, a
from saebench.torchtensors import PLAIN, Storage, Tensors, referred, storage_of

LARGEST_PICKLE = 64 * 2**20  # bytes of the pickle beside the storages
# How a legacy file begins: a pickle, of whatever protocol, of a number.
_LEGACY = re.compile(rb"\x80[\x02-\x05](\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)
_LONGEST_HEAD = 32  # bytes of it, and more
_VERSION = 1001


class TorchScript(Exception):
    """An archive that is a program, not only weights."""


def is_legacy(head: bytes) -> bool:
    """Whether a file that begins so is one that `torch.save` wrote before it wrote archives."""
    return _LEGACY.match(head) is not None


def read_torch(path: Path, names: Names, offset: int = 0) -> Any:
    """What `torch.save` wrote, from `offset` on. `names`: what it may name beside tensors.

    Dictionaries of any kind are plain ones, parameters plain tensors.
    Errors: ForeignName (it needs code), Damaged, Unsupported, TorchScript, OSError.
    """
    with path.open("rb") as file:
        return _read(file, offset, names)


def read_bare(file: BinaryIO, names: Names) -> Any:
    """What `pickle.dump` wrote, or `torch.save`. Errors: as `read_torch`."""
    file.seek(0)
    head = file.read(_LONGEST_HEAD)
    if head.startswith(ZIP) or is_legacy(head):
        return _read(file, 0, names)

    def nested(data: Any) -> Storage:
        return a(Storage, _legacy(a(Span, data), _either(PLAIN, _no_name)))

    tensors = Tensors()
    known = {"torch.storage._load_from_bytes": nested, **PLAIN, **tensors.names()}
    value, _ = loads(Span(file, 0, file.seek(0, io.SEEK_END)), _either(known, names))
    tensors.separate()
    return value


def _read(file: BinaryIO, start: int, names: Names) -> Any:
    data = Span(file, start, file.seek(0, io.SEEK_END))
    file.seek(start)
    read = _archive if file.read(len(ZIP)) == ZIP else _legacy
    tensors = Tensors()
    value = read(data, _either({**PLAIN, **tensors.names()}, names))
    tensors.separate()
    return value


def _either(known: Mapping[str, Any], names: Names) -> Names:
    return lambda name: known[name] if name in known else names(name)


def _no_name(name: str) -> Any:
    raise LookupError(name)


# --- containers ---


def _archive(data: Span, names: Names) -> Any:
    file = data.file
    found = members(file)
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in found):
        raise TorchScript
    _check_size(data, sum(info.file_size for info in found.values()))
    folders = [name.removesuffix("data.pkl") for name in found if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise Unsupported(f"an archive with {len(folders)} data.pkl: not one of torch.save")
    folder = folders[0]

    def read(name: str) -> Tensor:
        """[bytes] uint8."""
        if (info := found.get(folder + name)) is None:
            raise Damaged(f"the archive lacks {folder + name!r:.80}")
        tensor = torch.empty(info.file_size, dtype=torch.uint8)
        _fill(file, stored_at(file, info), tensor)
        return tensor

    if f"{folder}byteorder" in found and bytes(read("byteorder")) != b"little":
        raise Unsupported("its numbers are big-endian")
    storages: dict[str, Tensor] = {}

    def stored(reference: Any) -> Storage:
        dtype, key, n_bytes = referred(reference)
        if key not in storages:
            storages[key] = read(f"data/{key}")
        return storage_of(storages[key], dtype, n_bytes)

    return loads(Span.of(read("data.pkl").numpy().data), names, stored)[0]


def _legacy(data: Span, names: Names) -> Any:
    head = data.part(0, min(len(data), LARGEST_PICKLE))
    begins = _LEGACY.match(head.part(0, min(len(head), _LONGEST_HEAD)).read())
    if begins is None:
        raise Unsupported("a pickle that torch.save did not write")
    version, at = loads(head, _no_name, at=begins.end())
    system, at = loads(head, _no_name, at=at)
    if version != _VERSION:
        raise Unsupported("a legacy file of torch of an unknown version")
    if a(dict, system).get("little_endian") is not True:
        raise Unsupported("its numbers are big-endian")
    claimed = 0
    storages: dict[str, Tensor] = {}
    widths: dict[str, int] = {}

    def stored(reference: Any) -> Storage:
        nonlocal claimed
        dtype, key, n_bytes = referred(reference)
        if key not in storages:
            claimed += n_bytes
            _check_size(data, claimed)
            storages[key], widths[key] = torch.empty(n_bytes, dtype=torch.uint8), dtype.itemsize
        return storage_of(storages[key], dtype, n_bytes)

    value, at = loads(head, names, stored, at)
    keys, at = loads(head, _no_name, at=at)
    if sorted(a(str, key) for key in a(list, keys)) != sorted(storages):
        raise Damaged("a legacy file of torch whose storages are not those of its tensors")
    for key in keys:
        n = int.from_bytes(data.part(at, 8).read(), "little")
        if n * widths[key] != len(storages[key]):
            raise Damaged(f"a storage of {n:,} values where {len(storages[key]):,} bytes belong")
        _fill(data.file, data.part(at + 8, len(storages[key])).start, storages[key])
        at += 8 + len(storages[key])
    return value


def _check_size(data: Span, claimed: int) -> None:
    """Errors: Damaged where more is promised than the file has: no memory is taken for it."""
    if claimed > len(data):
        raise Damaged(f"it has {len(data):,} bytes, and says that it holds {claimed:,}")


def _fill(file: Any, at: int, tensor: Tensor) -> None:
    """Read bytes into a tensor [n] uint8. Errors: Damaged."""
    file.seek(at)
    rest = tensor.numpy().data
    while len(rest):
        if not (n := file.readinto(rest)):
            raise Damaged("the file is too short for its tensors")
        rest = rest[n:]
