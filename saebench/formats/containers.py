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
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from saebench.errors import WeightsError
from saebench.formats import pickles
from saebench.weights import LARGEST_HEADER, first_bytes, is_safetensors

Container = Literal["safetensors", "torch", "saev", "npz", "pickle"]

ZIP = b"PK\x03\x04"
GZIP = b"\x1f\x8b"
LARGEST_LINE = 2**20  # bytes of saev's line of JSON
LARGEST_CONFIG = 16 * 2**20
LARGEST_RATIO = 50  # of bytes decompressed to bytes stored; weights hardly compress
SMALL = 64 * 2**20  # bytes that may be decompressed whatever the ratio
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def container_of(path: Path) -> Container:
    """Errors: WeightsError for a file that holds no weights, or in no known form."""
    head = first_bytes(path)
    if is_safetensors(head):
        return "safetensors"
    if head.startswith(ZIP):
        return "npz" if _is_npz(path) else "torch"
    if head.startswith(_TORCH_LEGACY):
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


# --- JSON ---------------------------------------------------------------------------------------


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object. Errors: WeightsError (no object, damaged, a key twice)."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where} is not readable JSON: {error}", "get it again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{where} is a JSON {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key {', '.join(twice)} is there twice")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """A JSON or YAML file beside the weights. Errors: WeightsError (too large, damaged)."""
    if path.stat().st_size > LARGEST_CONFIG:
        raise WeightsError(f"{path} has {path.stat().st_size:,} bytes: that is no configuration")
    text = path.read_bytes()
    if path.suffix not in (".yaml", ".yml"):
        return parse_json(text, str(path))
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise WeightsError(f"{path} is not readable YAML: {first}", "get it again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} is a YAML {type(value).__name__}, not a mapping")
    return value


# --- safetensors --------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, its length checked against the file's.

    Errors: WeightsError for a truncated or damaged file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LARGEST_HEADER, size - 8):
            raise _truncated(path, 8 + length, size)
        header = parse_json(file.read(length), f"the safetensors header of {path}")
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != META]
        expected = 8 + length + max(ends, default=0)
    except (KeyError, TypeError, IndexError):
        raise WeightsError(f"{path} has a damaged safetensors header", "get it again") from None
    if expected != size:
        raise _truncated(path, expected, size)
    return header


META = "__metadata__"


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


def _is_npz(path: Path) -> bool:
    names = [info.filename for info in _members(path)]
    return bool(names) and all(name.endswith(".npy") for name in names)


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """The members of an archive. Errors: WeightsError (truncated, twice the same, a bomb)."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise pickles.damaged(path, error) from None
    names = [info.filename for info in members]
    if len(set(names)) != len(names):
        raise WeightsError(f"{path} holds two members of one name", "do not use it")
    stored, size = path.stat().st_size, sum(info.file_size for info in members)
    if size > max(SMALL, LARGEST_RATIO * stored):
        raise WeightsError(
            f"{path} has {stored:,} bytes, and says that it holds {size:,}", "do not use it"
        )
    return members


def read_torch(path: Path, offset: int = 0) -> Any:
    """What `torch.save` wrote, from `offset` on. Errors: WeightsError."""
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(4) == ZIP:
            _check_torch_archive(path)
        file.seek(offset)
        source: BinaryIO = _From(file, offset) if offset else file  # type: ignore[assignment]
        value = pickles.read_torch(source, path)
    pickles.check_tensors(value, path)
    return value


def _check_torch_archive(path: Path) -> None:
    members = _members(path)
    names = [info.filename for info in members]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise WeightsError(
            f"{path} is a TorchScript archive: a program, not only weights",
            "save the state dict where it was written: torch.save(sae.state_dict(), path)",
        )
    if any(info.compress_type != zipfile.ZIP_STORED for info in members):
        raise WeightsError(f"{path} is a compressed archive, which torch.save does not write")


class _From(io.RawIOBase):
    """A file from an offset on, as if it began there; saves holding a copy of what follows."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self._file, self._offset = file, offset

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._offset

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        self._file.seek(to + self._offset if whence == io.SEEK_SET else to, whence)
        return self.tell()

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined]


def read_saev(path: Path) -> tuple[dict[str, Any], Any]:
    """The line of JSON, and the state dict behind it. Errors: WeightsError."""
    with path.open("rb") as file:
        line = file.readline(LARGEST_LINE + 1)
    return parse_json(line, f"the first line of {path}"), read_torch(path, len(line))


def read_npz(path: Path) -> dict[str, torch.Tensor]:
    """The arrays as tensors. Errors: WeightsError (damaged, objects, more than is stored)."""
    sizes = {info.filename: info.file_size for info in _members(path)}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name, size in sizes.items():
                _check_array(archive.zip, name, size, path)
            arrays = {name: archive[name] for name in archive.files}
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    except (WeightsError, MemoryError):
        raise
    except Exception as error:
        raise pickles.damaged(path, error) from None


def _check_array(archive: zipfile.ZipFile, name: str, size: int, path: Path) -> None:
    """Errors: WeightsError where an array's header promises more than its member holds."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    if dtype.hasobject or int(np.prod(shape, dtype=np.float64)) * dtype.itemsize > size:
        raise WeightsError(
            f"{path}: {name} says it is {list(shape)} of {dtype}, and has {size:,} bytes",
            "do not use it",
        )


# --- bare pickles -------------------------------------------------------------------------------


def read_pickle(path: Path) -> Any:
    """A pickle, perhaps inside gzip. Errors: WeightsError."""
    data = path.read_bytes()
    if data.startswith(GZIP):
        data = _gunzipped(path, len(data))
    if data.startswith((_TORCH_LEGACY, ZIP)):
        value = pickles.read_torch(io.BytesIO(data), path)
    else:
        value = pickles.read_bare_pickle(data, path)
    pickles.check_tensors(value, path)
    return value


def _gunzipped(path: Path, stored: int) -> bytes:
    most = max(SMALL, LARGEST_RATIO * stored)
    try:
        with gzip.open(path) as file:
            data = file.read(most + 1)
    except (OSError, EOFError, ValueError) as error:
        raise pickles.damaged(path, error) from None
    except Exception as error:  # zlib.error is no OSError
        raise pickles.damaged(path, error) from None
    if len(data) > most:
        raise WeightsError(
            f"{path} has {stored:,} bytes and decompresses to more than {most:,}", "do not use it"
        )
    return data


def as_mapping(value: Any, where: Path) -> Mapping[str, Any]:
    """Errors: WeightsError where a file's content is no mapping of names."""
    if isinstance(value, pickles.Stub):
        return vars(value)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise WeightsError(f"{where} holds a {type(value).__name__}, not named tensors")
    return value
