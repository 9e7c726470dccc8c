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
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from saebench.archives import ZIP, members, stored_at
from saebench.pickles import Damaged, Names, Span, Unsupported, a, loads, plain_key

LARGEST_PICKLE = 64 * 2**20  # bytes of the pickle beside the storages
MOST_TENSORS = 20_000  # a training checkpoint has some thousands
# How a legacy file begins: a pickle, of whatever protocol, of a number.
_LEGACY = re.compile(rb"\x80[\x02-\x05](\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)
_LONGEST_HEAD = 32  # bytes of it, and more
_VERSION = 1001
_MOST_DIMENSIONS = 16
_LARGEST_EMPTY = 2**30  # what the dimensions of an empty tensor make that are not 0
_LARGEST_COPIES = 2**26  # bytes of all tensors of a file that show a stored value twice


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

    def nested(data: Any) -> _Storage:
        return a(_Storage, _legacy(a(Span, data), _either(_PLAIN, _no_name)))

    tensors = _Tensors()
    known = {"torch.storage._load_from_bytes": nested, **_PLAIN, **tensors.names()}
    value, _ = loads(Span(file, 0, file.seek(0, io.SEEK_END)), _either(known, names))
    tensors.separate()
    return value


def _read(file: BinaryIO, start: int, names: Names) -> Any:
    data = Span(file, start, file.seek(0, io.SEEK_END))
    file.seek(start)
    read = _archive if file.read(len(ZIP)) == ZIP else _legacy
    tensors = _Tensors()
    value = read(data, _either({**_PLAIN, **tensors.names()}, names))
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

    def stored(reference: Any) -> _Storage:
        dtype, key, n_bytes = _referred(reference)
        if key not in storages:
            storages[key] = read(f"data/{key}")
        return _storage(storages[key], dtype, n_bytes)

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

    def stored(reference: Any) -> _Storage:
        nonlocal claimed
        dtype, key, n_bytes = _referred(reference)
        if key not in storages:
            claimed += n_bytes
            _check_size(data, claimed)
            storages[key], widths[key] = torch.empty(n_bytes, dtype=torch.uint8), dtype.itemsize
        return _storage(storages[key], dtype, n_bytes)

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


# --- tensors ---


@dataclass(frozen=True, eq=False)
class _Storage:
    """The bytes of a storage, and what one value in it is."""

    data: Tensor
    dtype: torch.dtype

    @property
    def n(self) -> int:
        return len(self.data) // self.dtype.itemsize


def _referred(reference: Any) -> tuple[torch.dtype, str, int]:
    """(dtype, key, bytes) of a reference to a storage, as both containers write it."""
    kind, dtype, key, _, n, *view = a(tuple, reference)
    if kind != "storage" or view not in ([], [None]) or a(int, n) < 0:
        raise Damaged("a reference to something that is no storage")
    return a(torch.dtype, dtype), a(str, key), n * dtype.itemsize


def _storage(data: Tensor, dtype: torch.dtype, n_bytes: int) -> _Storage:
    if len(data) != n_bytes:
        raise Damaged(f"a storage of {len(data):,} bytes, and {n_bytes:,} are referred to")
    return _Storage(data, dtype)


class _Tensors:
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
        stored = a(_Storage, storage).n
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
        of = _Storage(a(_Storage, storage).data, a(torch.dtype, dtype))
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
_PLAIN: Mapping[str, Any] = {
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
