"""A safetensors file as bytes: written canonically, and known by its tensors alone.

Its header is JSON of each tensor's dtype, shape and place, and of texts about the whole. The
library orders those texts at random, so that one content has many files. Loads no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.errors import WeightsError
from saebench.identity import canonical_json, content_hash
from saebench.weights import LARGEST_HEADER

if TYPE_CHECKING:
    from torch import Tensor

_META = "__metadata__"


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The one file of these tensors and texts."""
    from safetensors.torch import save

    data = save(dict(tensors), metadata=dict(metadata))
    length = int.from_bytes(data[:8], "little")
    header = canonical_json(json.loads(data[8 : 8 + length])).encode("ascii")
    header += b" " * (-len(header) % 8)  # tensors stay aligned to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def tensors_sha256(path: Path) -> str:
    """What identifies a file's tensors: their names, dtypes, shapes and bytes, and no text.

    Errors: WeightsError for a file that is no whole safetensors file.
    """
    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        if length > min(LARGEST_HEADER, len(data) - 8):
            raise ValueError("it ends within its header")
        header = json.loads(data[8 : 8 + length])
        said = {
            name: _said(entry, data, 8 + length) for name, entry in header.items() if name != _META
        }
        return content_hash(said)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is no whole safetensors file: {error}") from None


def _said(entry: Mapping[str, Any], data: bytes, at: int) -> dict[str, Any]:
    start, stop = entry["data_offsets"]
    if not 0 <= start <= stop <= len(data) - at:
        raise ValueError("it ends within a tensor")
    return {
        "dtype": entry["dtype"],
        "shape": entry["shape"],
        "sha256": hashlib.sha256(data[at + start : at + stop]).hexdigest(),
    }
