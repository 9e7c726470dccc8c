"""Named numpy arrays to and from safetensors: as bytes, or as views of a file on the disk.

A safetensors file is: the header's length (8 bytes, little endian), the header (JSON: name ->
dtype, shape, begin and end of its bytes), and the bytes, aligned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}
_KNOWN = {np.dtype(dtype) for dtype in _DTYPES.values()}


def to_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as the bytes of a safetensors file. Errors: TypeError for strings and objects."""
    from safetensors.numpy import save

    for name, array in arrays.items():
        if array.dtype not in _KNOWN:
            raise TypeError(f"'{name}' is an array of {array.dtype}: only numbers can be saved")
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def from_bytes(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, every bit as it was saved."""
    from safetensors.numpy import load

    return load(data)


def memory_map(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file as read-only views: nothing is read until it is used.

    Each such file stays open.
    """
    return _views(np.memmap(path, dtype=np.uint8, mode="r"))


def closed_map(path: Path) -> dict[str, np.ndarray]:
    """The same with the file closed. Numbers that are written into it go into memory alone."""
    import torch

    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return _views(whole.numpy())


def _views(file: np.ndarray) -> dict[str, np.ndarray]:
    n_header = int.from_bytes(file[:8].tobytes(), "little")
    header = json.loads(file[8 : 8 + n_header].tobytes())
    whole, arrays = file[8 + n_header :], {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            arrays[name] = whole[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays
