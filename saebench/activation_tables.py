"""Tensors of a segment's images as a table on the disk, and back, every bit as it was.

    place    [n] int64   where in the segment each image stands; what is not there did not decode
    <name>   [n …]       one tensor an image, in the dtype of the computation

bfloat16, which numpy lacks, lies there as its bits in int16. The manifest's notes say of each
tensor its dtype and the order of its axes in memory: read back it lies as the model's own does,
without which a convolution rounds otherwise (`saebench.backbones.sites.laid_out`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.backbones.sites import axes_in_memory
from saebench.shards import Shards, ShardWriter
from saebench.store import Store

KIND = "tokens"
PLACE = "place"
SHARD_BYTES = 64 << 20


class Table:
    """A finished table, memory-mapped. places: [n] int64, ascending.

    Errors: ValueError for one that is not of this form.
    """

    def __init__(self, shards: Shards) -> None:
        self.folder = shards.folder
        self._shards = list(shards)
        self._starts = np.cumsum([0, *(len(shard[PLACE]) for shard in self._shards)])
        self.places = np.concatenate([shard[PLACE] for shard in self._shards])
        notes = shards.manifest.get("notes", {})
        try:
            self.left_out = {int(place): str(why) for place, why in notes["left_out"].items()}
            self._form = {
                name: (getattr(torch, form["dtype"]), tuple(form["axes"]))
                for name, form in notes["tensors"].items()
            }
        except (KeyError, TypeError, AttributeError):
            raise ValueError("the notes of its manifest are damaged") from None
        for name, (dtype, axes) in self._form.items():
            array = self._shards[0][name]
            if sorted(axes) != list(range(array.ndim)) or array.dtype != _bits(dtype):
                raise ValueError(f"the notes on '{name}' in its manifest are damaged")

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of images start:stop of the table, in memory of their own, on the CPU."""
        return {name: self._tensor(name, start, stop) for name in self._form}

    def _tensor(self, name: str, start: int, stop: int) -> Tensor:
        dtype, axes = self._form[name]
        shape = (stop - start, *self._shards[0][name].shape[1:])
        # Not a view of the file: where a tensor begins in memory may decide how a product rounds.
        tensor = torch.empty([shape[axis] for axis in axes], dtype=dtype)
        tensor = tensor.permute(tuple(np.argsort(axes)))
        array = as_array(tensor)
        for first, shard in zip(self._starts, self._shards, strict=False):
            low, high = max(start, first), min(stop, first + len(shard[PLACE]))
            if low < high:
                array[low - start : high - start] = shard[name][low - first : high - first]
        return tensor


class TableWriter:
    """Writes a table as its images come. Nothing is to be seen of it before `complete`."""

    def __init__(self, store: Store, fields: Mapping[str, Any]) -> None:
        self._store, self._fields = store, fields
        self._writer: ShardWriter | None = None
        self._form: dict[str, dict[str, Any]] = {}
        self._most = 0

    def append(self, places: np.ndarray, tensors: Mapping[str, Tensor]) -> None:
        """Add images. tensors: each [b …]. Errors: WriteError."""
        arrays = {name: as_array(tensor) for name, tensor in tensors.items()}
        if len(places) > self._most:  # the order of axes is ambiguous where there is one image
            self._most = len(places)
            self._form = {name: _form_of(tensor) for name, tensor in tensors.items()}
        if self._writer is None:
            n_bytes = 8 + sum(array[:1].nbytes for array in arrays.values())
            rows = max(1, SHARD_BYTES // n_bytes)
            writer = self._store.shard_writer(KIND, self._fields, rows=rows)
            self._writer = writer.__enter__()
        self._writer.append({PLACE: places.astype(np.int64), **arrays})

    def complete(self, fields: Mapping[str, Any], left_out: Mapping[int, str]) -> None:
        """Put it where it is found under `fields`; nothing of no images. Errors: WriteError."""
        if self._writer is not None:
            self._writer.becomes(
                fields,
                notes={
                    "tensors": self._form,
                    "left_out": {str(place): why for place, why in left_out.items()},
                },
            )
            writer, self._writer = self._writer, None
            writer.complete()

    def drop(self) -> None:
        """Leave nothing behind."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.drop()


def as_array(tensor: Tensor) -> np.ndarray:
    """A tensor's numbers as numpy has them; of one on the CPU a view."""
    tensor = tensor.detach().cpu()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _bits(dtype: torch.dtype) -> np.dtype:
    """How numbers of a torch dtype lie in a table."""
    return as_array(torch.empty(0, dtype=dtype)).dtype


def _form_of(tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "axes": list(axes_in_memory(tensor))}
