"""What holds the tensors of a file, by its first bytes, and how each kind is opened safely.

    safetensors   8 bytes of length and a JSON header
    torch         a zip archive of `torch.save`, or its old form, a chain of pickles
    saev          one line of JSON, then a zip archive of `torch.save`
    npz           a zip archive of NumPy arrays
    pickle        a bare pickle, perhaps inside gzip

Nothing here runs code from a file. Sizes that a file declares are held against the bytes that it
has before memory is taken for them.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from saebench import archives
from saebench.archives import ZIP
from saebench.errors import WeightsError
from saebench.formats import pickles
from saebench.plainvalues import Damaged, Stub, Unsupported, bounded
from saebench.torchfiles import is_legacy
from saebench.torchtensors import MOST_TENSORS
from saebench.weights import first_bytes, is_safetensors

Container = Literal["safetensors", "torch", "saev", "npz", "pickle"]

GZIP = b"\x1f\x8b"
LARGEST_LINE = 2**20  # bytes of saev's line of JSON
LARGEST_CONFIG = 16 * 2**20
LARGEST_HEADER = 4 * 2**20  # of safetensors: some hundred bytes for a tensor
LARGEST_YAML = 2**18  # PyYAML reads some hundred kilobytes a second
LARGEST_RATIO = 20  # of bytes decompressed to bytes stored; weights hardly compress
SMALL = 64 * 2**20  # bytes that may be decompressed whatever the ratio
LARGEST_PICKLE = 16 * 2**30
PIECE = 2**20  # bytes that are decompressed at once
LONGEST_NAME = 200
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "BOOL": 8} | {
    f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)
}


def container_of(path: Path) -> Container:
    """Errors: WeightsError for a file that holds no weights, or in no known form."""
    head = first_bytes(path)
    if is_safetensors(head):
        return "safetensors"
    if head.startswith(ZIP):
        return "npz" if _is_npz(path) else "torch"
    if is_legacy(head):
        return "torch"
    if head.startswith((GZIP, b"\x80")):
        return "pickle"
    if head.startswith(b"{"):
        return _after_a_line(path)
    raise WeightsError(
        f"{path} is no weights file of a known kind (it begins with {head[:8]!r})",
        "known: safetensors, torch archives, saev's, NumPy's .npz, pickles of tensors; "
        "a truncated or compressed file is none",
    )


def _after_a_line(path: Path) -> Container:
    with path.open("rb") as file:
        line = file.readline(LARGEST_LINE + 1)
        if len(line) <= LARGEST_LINE and line.endswith(b"\n") and file.read(4) == ZIP:
            return "saev"
    raise WeightsError(
        f"{path} is JSON: a configuration, not weights",
        "name the weights file that lies beside it",
    )


# --- configurations -----------------------------------------------------------------------------


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object. Errors: WeightsError (no object, damaged, a key twice, too deep)."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        bounded(value)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where} is not readable JSON: {error}", "get it again") from None
    return _mapping(value, f"{where} is a JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r:.80} is there twice")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """A JSON or YAML file beside the weights. Errors: WeightsError (too large, damaged)."""
    is_yaml = path.suffix in (".yaml", ".yml")
    most = LARGEST_YAML if is_yaml else LARGEST_CONFIG
    try:
        with path.open("rb") as file:
            text = file.read(most + 1)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    if len(text) > most:
        raise WeightsError(
            f"{path} has more than {most:,} bytes: that is no configuration", "get it again"
        )
    if not is_yaml:
        return parse_json(text, str(path))
    from saebench.formats.yamls import parse_yaml

    try:
        value = parse_yaml(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not readable YAML: {error}", "get it again") from None
    return _mapping(value, f"{path} is a YAML")


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WeightsError(
            f"{what} {type(value).__name__}, not a mapping of names", "is it the right file?"
        )
    return value


# --- safetensors --------------------------------------------------------------------------------

META = "__metadata__"


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, every entry held against the bytes that are there.

    Errors: WeightsError for a truncated or damaged file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise _truncated(path, 8 + length, size)
        if length > LARGEST_HEADER:
            raise pickles.unsupported(path, Unsupported(f"a header of {length:,} bytes"))
        header = parse_json(file.read(length), f"the safetensors header of {path}")
    entries = {name: entry for name, entry in header.items() if name != META}
    if len(entries) > MOST_TENSORS:
        raise pickles.unsupported(path, Unsupported(f"a file of {len(entries):,} tensors"))
    check_names(entries, path)
    try:
        metadata = header.get(META, {})
        if not all(isinstance(text, str) for text in [*metadata.keys(), *metadata.values()]):
            raise Damaged("its metadata are no texts")
        expected = 8 + length + _end_of(entries)
    except (Damaged, KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{path} has a damaged safetensors header: {error}", "get it again"
        ) from None
    if expected != size:
        raise _truncated(path, expected, size)
    return header


def _end_of(entries: Mapping[str, Any]) -> int:
    """Where the last tensor ends: they follow each other without gaps. Errors: Damaged."""
    end = 0
    for start, stop, name in sorted(
        (*entry["data_offsets"], name) for name, entry in entries.items()
    ):
        shape = entries[name]["shape"]
        if not all(type(n) is int and n >= 0 for n in [start, stop, *shape]):
            raise Damaged(f"{name} has the shape {shape!r:.80} at {start!r:.40}")
        bits = math.prod(shape) * _BITS.get(entries[name]["dtype"], 0)
        if start != end or 8 * (stop - start) != bits:
            kind = f"{entries[name]['dtype']!r:.20} {shape!r:.80}"
            raise Damaged(f"{name}, {kind}, cannot be at bytes {start:,} to {stop:,}")
        end = stop
    return end


def _truncated(path: Path, expected: int, size: int) -> WeightsError:
    return WeightsError(
        f"{path} should have {expected:,} bytes and has {size:,}",
        "it was only partly downloaded or was altered: download it again",
    )


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors. Errors: WeightsError."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise pickles.damaged(path, error) from None


# --- zip archives -------------------------------------------------------------------------------


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive. Errors: WeightsError (truncated, twice the same, too many)."""
    try:
        return archives.members(path)
    except Unsupported as error:
        raise pickles.unsupported(path, error) from None
    except Damaged as error:
        raise pickles.damaged(path, error) from None


def _is_npz(path: Path) -> bool:
    names = _members(path)
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote. Errors: WeightsError."""
    return pickles.read_torch(path)


def read_saev(path: Path) -> tuple[dict[str, Any], Any]:
    """The line of JSON, and the state dict behind it. Errors: WeightsError."""
    with path.open("rb") as file:
        line = file.readline(LARGEST_LINE + 1)
    return parse_json(line, f"the first line of {path}"), pickles.read_torch(path, len(line))


def read_npz(path: Path) -> dict[str, torch.Tensor]:
    """The arrays as tensors. Errors: WeightsError (damaged, a bomb, more than is stored)."""
    members = _members(path)
    size = sum(info.file_size for info in members.values())
    if size > _most(stored := path.stat().st_size):
        raise _bomb(path, stored, size)
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy"): _array(archive, name) for name in members}
    except MemoryError:
        raise
    except Unsupported as error:
        raise pickles.unsupported(path, error) from None
    except Exception as error:  # what NumPy and zipfile raise for damaged bytes is not documented
        raise pickles.damaged(path, error) from None


def _array(archive: zipfile.ZipFile, name: str) -> torch.Tensor:
    """Errors: Damaged where an array's header promises other than its member holds, Unsupported."""
    size = archive.getinfo(name).file_size
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise Unsupported(f"{name} has an array of version {version}")
        read = f"read_array_header_{version[0]}_0"
        shape, fortran, dtype = getattr(np.lib.format, read)(file)
        if dtype.kind not in "fiub" or dtype.itemsize > 8:
            raise Unsupported(f"{name} is an array of {dtype}, not of numbers".replace("\n", " "))
        n_bytes = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or n_bytes != size - file.tell():
            raise Damaged(
                f"{name} says it is {list(shape)!r:.80} of {dtype}, and has {size:,} bytes"
            )
        # By pieces: `readinto` of an archive's member reads all of it first, and copies it then.
        raw = np.empty(n_bytes, np.uint8)
        for at in range(0, n_bytes, PIECE):
            part = file.read(n := min(PIECE, n_bytes - at))
            if len(part) < n:
                raise Damaged(f"{name} ends after {at + len(part):,} of {n_bytes:,} bytes")
            raw[at : at + n] = np.frombuffer(part, np.uint8)
    array = raw.view(dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))


# --- bare pickles -------------------------------------------------------------------------------


def read_pickle(path: Path) -> Any:
    """A pickle, perhaps inside gzip. Errors: WeightsError."""
    if (size := path.stat().st_size) > LARGEST_PICKLE:
        raise WeightsError(
            f"{path} is a pickle of {size:,} bytes: no SAE's is so large",
            "save it with torch.save, or as safetensors",
        )
    if first_bytes(path).startswith(GZIP):
        return pickles.read_bare(_gunzipped(path), path)
    with path.open("rb") as file:
        return pickles.read_bare(file, path)


def _gunzipped(path: Path) -> io.BytesIO:
    """All of it: a pickle is not read from its start to its end in one go."""
    most, found = _most(stored := path.stat().st_size), io.BytesIO()
    try:
        with gzip.open(path) as file:
            while (part := file.read(PIECE)) and found.tell() <= most:
                found.write(part)
    except (OSError, EOFError, zlib.error) as error:
        raise pickles.damaged(path, error) from None
    if (size := found.tell()) > most:
        raise _bomb(path, stored, size)
    return found


def _most(stored: int) -> int:
    """The bytes that so many stored ones may decompress to."""
    return max(SMALL, LARGEST_RATIO * stored)


def _bomb(path: Path, stored: int, size: int) -> WeightsError:
    return WeightsError(
        f"{path} has {stored:,} bytes, which decompress to {size:,} or more",
        "weights hardly compress: do not use it",
    )


# --- names --------------------------------------------------------------------------------------


def as_mapping(value: Any, where: Path) -> Mapping[str, Any]:
    """Errors: WeightsError where a file's content is no mapping of names."""
    if isinstance(value, Stub):
        return vars(value)
    if not isinstance(value, Mapping):
        raise WeightsError(
            f"{where} holds a {type(value).__name__}, not named tensors",
            "save the weights by name: torch.save(sae.state_dict(), path)",
        )
    check_names(value, where)
    return value


def check_names(names: Iterable[Any], where: Path) -> None:
    """Errors: WeightsError for names that cannot be shown, such as control characters."""
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or len(name) > LONGEST_NAME:
            raise WeightsError(
                f"{where} holds something under the name {name!r:.80}", "that is no name of weights"
            )
