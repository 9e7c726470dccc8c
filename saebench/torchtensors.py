"""The tensors that pickles describe: views of storages, built without any function of torch's.

A storage is bytes that somebody else reads. A tensor is a view of one, whole, and no more: what a
file says of shape and strides is held against the values that its storage has. What torch builds
beside these (sparse, quantised, without values) does not exist here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saebench.plainvalues import Damaged, Span, Unsupported, a, plain_key

MOST_TENSORS = 20_000  # a training checkpoint has some thousands
_MOST_DIMENSIONS = 16
_LARGEST_EMPTY = 2**30  # what the dimensions of an empty tensor make that are not 0
_LARGEST_COPIES = 2**26  # bytes of all tensors of a file that show a stored value twice


@dataclass(frozen=True, eq=False)
class Storage:
    """The bytes of a storage, and what one value in it is."""

    data: Tensor
    dtype: torch.dtype

    @property
    def n(self) -> int:
        return len(self.data) // self.dtype.itemsize


def referred(reference: Any) -> tuple[torch.dtype, str, int]:
    """(dtype, key, bytes) of a reference to a storage, as both containers write it."""
    kind, dtype, key, _, n, *view = a(tuple, reference)
    if kind != "storage" or view not in ([], [None]) or a(int, n) < 0:
        raise Damaged("a reference to something that is no storage")
    return a(torch.dtype, dtype), a(str, key), n * dtype.itemsize


def storage_of(data: Tensor, dtype: torch.dtype, n_bytes: int) -> Storage:
    if len(data) != n_bytes:
        raise Damaged(f"a storage of {len(data):,} bytes, and {n_bytes:,} are referred to")
    return Storage(data, dtype)


class Tensors:
    """Builds the tensors of one file, which it counts."""

    def __init__(self) -> None:
        self.n, self.copied = 0, 0
        self.overlapping: list[Tensor] = []

    def names(self) -> Mapping[str, Any]:
        """What stands for the functions that build tensors."""
        return {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.tensor_of_bytes,
            "torch._utils._rebuild_parameter": self.parameter,
            "torch._utils._rebuild_parameter_with_state": self.parameter,
            "torch._tensor._rebuild_from_type_v2": self.of_type,
        }

    def tensor(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        metadata: Any = None,
    ) -> Tensor:
        """A view of a storage, which may not be read yet."""
        if metadata:
            # `{"neg": True}` or `{"conj": True}`.
            raise Unsupported("a tensor that is the negative or conjugate of what is stored")
        self.n += 1
        if self.n > MOST_TENSORS:
            raise Unsupported(f"a file of more than {MOST_TENSORS:,} tensors")
        if max(len(a(tuple, shape)), len(a(tuple, strides))) > _MOST_DIMENSIONS:
            raise Damaged(f"a tensor of {len(shape)} dimensions and {len(strides)} strides")
        sizes, steps = [a(int, n) for n in shape], [a(int, n) for n in strides]
        stored = a(Storage, storage).n
        spans = [(size - 1) * step for size, step in zip(sizes, steps, strict=True)]
        if 0 in sizes:  # nothing of it is stored
            fits = math.prod(size or 1 for size in sizes) <= max(stored, _LARGEST_EMPTY)
        else:
            fits = a(int, offset) + sum(spans) < stored
        if not fits or min([a(int, offset), *sizes, *steps]) < 0:
            raise Damaged(
                f"a tensor of shape {sizes} and strides {steps} in a storage of {stored:,} values"
            )
        if 0 in sizes:
            return torch.empty(sizes, dtype=storage.dtype)
        # The step along a dimension of 1 is never taken, and may be any number.
        steps = [step if size > 1 else 1 for size, step in zip(sizes, steps, strict=True)]
        overlaps = _overlaps(sizes, steps)
        self.copied += overlaps * math.prod(sizes) * storage.dtype.itemsize
        if self.copied > _LARGEST_COPIES:
            raise Unsupported(f"a tensor of shape {sizes} expanded from {stored:,} values")
        view = storage.data.view(storage.dtype).as_strided(sizes, steps, offset)
        if overlaps:
            self.overlapping.append(view)
        return view

    def separate(self) -> None:
        """Give each tensor that shows a stored value twice values of its own."""
        for view in self.overlapping:
            view.data = view.clone(memory_format=torch.contiguous_format)

    def tensor_of_bytes(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any,
        hooks: Any,
        dtype: Any,
        metadata: Any = None,
    ) -> Tensor:
        """A tensor of a kind that has no storage of its own."""
        of = Storage(a(Storage, storage).data, a(torch.dtype, dtype))
        if len(of.data) % of.dtype.itemsize:
            raise Damaged(f"a storage of {len(of.data):,} bytes for values of {of.dtype}")
        return self.tensor(of, offset, shape, strides, metadata=metadata)

    def parameter(self, tensor: Any, *_: Any) -> Tensor:
        return a(Tensor, tensor)

    def of_type(self, rebuild: Any, _: Any, arguments: Any, __: Any) -> Tensor:
        """A parameter or tensor that has attributes, which are no weights."""
        if rebuild not in (self.tensor, self.tensor_of_bytes, self.parameter):
            raise Damaged("a tensor of another kind")
        return rebuild(*a(tuple, arguments))


def _overlaps(sizes: Sequence[int], steps: Sequence[int]) -> bool:
    """Whether two places of a view may be one of its storage."""
    reach = 0
    for step, size in sorted(zip(steps, sizes, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += (size - 1) * step
    return False


def _dictionary(items: Any = None) -> dict[Any, Any]:
    return {} if items is None else dict(a(dict, items))


def _bytes(text: Any, encoding: Any) -> Span:
    """Bytes, as protocol 2 writes them."""
    if encoding != "latin1":
        raise Damaged("bytes that are encoded in a way that pickles never use")
    return Span.of(a(str, text).encode("latin1"))


_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
# Of these, the storage says only how many bytes it has.
_OF_BYTES = (
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
PLAIN: Mapping[str, Any] = {
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "builtins.set": lambda items=(): frozenset(plain_key(item) for item in a(list, items)),
    "_codecs.encode": _bytes,
    "torch.Size": lambda items=(): a(tuple, items),
    "torch.device": lambda kind, n=None: (
        a(str, kind) if n is None else f"{a(str, kind)}:{a(int, n)}"
    ),
    "torch.Tensor": None,
    "torch.nn.parameter.Parameter": None,
    **{f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
    **{str(dtype): dtype for dtype in (*_DTYPES.values(), *_OF_BYTES)},
}
"""What pickles of tensors name beside functions that build them. `None`: nothing is done."""
