"""What a weights file is by its content: container from the first bytes, then tensors by name.

The file's name proves nothing. Nothing here executes code from a file: a torch archive is read
with `weights_only=True`, and what that refuses stays unread.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from saebench.errors import WeightsError
from saebench.weights import LARGEST_HEADER, first_bytes, is_safetensors

Container = Literal["safetensors", "torch"]


@dataclass(frozen=True)
class Content:
    """One weights file. `metadata` and `shapes` are read without reading the tensors."""

    path: Path
    container: Container

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The free text fields of a safetensors header; empty for other containers."""
        return self._header.get("__metadata__", {}) if self.container == "safetensors" else {}

    @property
    def names(self) -> list[str]:
        """The names of its tensors, or the top-level keys of a torch archive."""
        if self.container == "safetensors":
            return sorted(name for name in self._header if name != "__metadata__")
        return sorted(str(key) for key in self.tensors)

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Tensors by name, in the file's own dtype, on the CPU. Errors: WeightsError."""
        try:
            if self.container == "safetensors":
                from safetensors.torch import load_file

                return load_file(self.path)
            loaded = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WeightsError(
                f"{self.path} cannot be read: {first}",
                "it is damaged, or needs code to be run to be read: restore it, "
                "or convert it to safetensors with its own library",
            ) from None
        if not isinstance(loaded, dict):
            raise WeightsError(f"{self.path} holds a {type(loaded).__name__}, not named tensors")
        return loaded

    @cached_property
    def _header(self) -> dict[str, Any]:
        return read_header(self.path)


def sniff(path: Path) -> Content:
    """The container of a file. Errors: WeightsError for everything that holds no weights."""
    head = first_bytes(path)
    if is_safetensors(head):
        read_header(path)
        return Content(path, "safetensors")
    if head.startswith(b"PK\x03\x04"):
        return Content(path, "torch")
    raise WeightsError(
        f"{path} is neither safetensors nor a torch archive (it begins with {head[:8]!r})",
        "it is truncated, or of a container that is not read: convert it to safetensors",
    )


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, its length checked against the file's.

    Errors: WeightsError for a truncated or damaged file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LARGEST_HEADER, size - 8):
            raise _truncated(path, 8 + length, size)
        try:
            header = json.loads(file.read(length))
            ends = [
                entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WeightsError(
                f"{path} has a damaged safetensors header", "download it again"
            ) from None
    expected = 8 + length + max(ends, default=0)
    if expected != size:
        raise _truncated(path, expected, size)
    return header


def _truncated(path: Path, expected: int, size: int) -> WeightsError:
    return WeightsError(
        f"{path} should have {expected:,} bytes and has {size:,}",
        "it was only partly downloaded or was altered: download it again",
    )
