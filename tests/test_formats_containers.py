"""Files that were made to do harm: each is refused in words, and nothing of it runs.

Pickles are assembled operation by operation, archives byte by byte; all are read with little memory
and little time.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from saebench.errors import SaebenchError, WeightsError
from saebench.formats import read_sae
from saebench.formats.containers import read_config
from saebench.formats.content import sniff

# --- pickles, assembled -------------------------------------------------------------------------

RAN = "ran"  # the file that an attack would leave in the working directory
START, STOP, MARK, CALL, BUILD, NEW = b"\x80\x02", b".", b"(", b"R", b"b", b"\x81"
EMPTY, LIST, DICT, TUPLE, PERSISTENT = b")", b"]", b"}", b"t", b"Q"
CONFIG = "x.Config"  # a class that is stubbed


def name(full: str) -> bytes:
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def value(plain: Any) -> bytes:
    """The operations that push a plain value."""
    return pickle.dumps(plain, 2)[2:-1]


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + MARK + b"".join(arguments) + TUPLE + CALL


def a_pickle(*operations: bytes) -> bytes:
    return START + b"".join(operations) + STOP


def named(operations: bytes) -> bytes:
    """A pickle of {"w": …}."""
    return a_pickle(DICT, value("w"), operations, b"s")


def storage(kind: bytes = name("torch.FloatStorage"), key: Any = "0", n: Any = 4) -> bytes:
    return (
        MARK + value("storage") + kind + value(key) + value("cpu") + value(n) + TUPLE + PERSISTENT
    )


def tensor(
    of: bytes | None = None,
    offset: Any = 0,
    shape: Any = (4,),
    strides: Any = (1,),
    *more: Any,
) -> bytes:
    return call(
        name("torch._utils._rebuild_tensor_v2"),
        storage() if of is None else of,
        value(offset),
        value(shape),
        value(strides),
        value(False),
        value(None),
        *map(value, more),
    )


# --- what holds them ----------------------------------------------------------------------------

LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)
STORED = np.arange(4, dtype=np.float32).tobytes()


def zipped(data: bytes, members: Mapping[str, bytes] | None = None, **how: Any) -> bytes:
    """What `torch.save` writes: data.pkl, and storage 0 of four float32."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **how) as archive:
        archive.writestr("archive/data.pkl", data)
        for member, content in ({"data/0": STORED} if members is None else members).items():
            archive.writestr(f"archive/{member}", content)
    return file.getvalue()


def legacy(data: bytes, keys: tuple[str, ...] = ("0",), stored: bytes | None = None) -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    count = struct.pack("<q", 4)
    return b"".join(
        [
            LEGACY,
            pickle.dumps(1001, 2),
            pickle.dumps(system, 2),
            data.replace(TUPLE + PERSISTENT, b"N" + TUPLE + PERSISTENT),  # it has one field more
            pickle.dumps(list(keys), 2),
            count + STORED if stored is None else stored,
        ]
    )


def inside(data: bytes) -> bytes:
    """A bare pickle with a storage that is a legacy file of its own."""
    return named(call(name("torch.storage._load_from_bytes"), b"B" + _counted(legacy(data))))


def _counted(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


HOLDERS: dict[str, Callable[[bytes], bytes]] = {
    "archive": zipped,
    "legacy": legacy,
    "bare": lambda data: data,
    "gzip": lambda data: gzip.compress(data),
    "saev": lambda data: b'{"schema": 5}\n' + zipped(data),
    "gzip of an archive": lambda data: gzip.compress(zipped(data)),
    "inside": inside,
}

# --- programs -----------------------------------------------------------------------------------

TOUCH = f"touch {RAN}"
OPEN = f"open({RAN!r}, 'w').close()"
PROGRAMS: dict[str, bytes] = {
    "os.system": named(call(name("os.system"), value(TOUCH))),
    "posix.system": named(call(name("posix.system"), value(TOUCH))),
    "eval": named(call(name("builtins.eval"), value(OPEN))),
    "exec": named(call(name("builtins.exec"), value(OPEN))),
    "python 2": named(call(name("__builtin__.eval"), value(OPEN))),
    "getattr": named(
        call(
            call(
                name("builtins.getattr"),
                call(name("builtins.__import__"), value("os")),
                value("system"),
            ),
            value(TOUCH),
        )
    ),
    "partial": named(call(call(name("functools.partial"), name("os.system"), value(TOUCH)))),
    "map": named(
        call(
            name("builtins.list"),
            call(name("builtins.map"), name("os.system"), LIST + value(TOUCH) + b"a"),
        )
    ),
    "subprocess": named(call(name("subprocess.getoutput"), value(TOUCH))),
    "a pickle inside": named(
        call(name("pickle.loads"), value(a_pickle(call(name("os.system"), value(TOUCH)))))
    ),
    "torch's own loader": named(call(name("torch.load"), value("x"), value(None))),
    "torch.jit": named(call(name("torch.jit.load"), value("x"))),
    "torch.hub": named(call(name("torch.hub.load"), value("a/b"), value("c"))),
    "a class": named(name("subprocess.Popen") + EMPTY + NEW),
    "copyreg": named(
        call(
            name("copyreg._reconstructor"),
            name("subprocess.Popen"),
            name("builtins.object"),
            value(None),
        )
    ),
    "numpy": named(
        call(
            name("numpy.core.multiarray._reconstruct"),
            name("numpy.ndarray"),
            value((0,)),
            value("b"),
        )
    ),
    "dots": b"\x80\x04"
    + b"\x8c\x02os"
    + b"\x8c\x06system"
    + b"\x93"
    + MARK
    + value(TOUCH)
    + b"tR.",
    "nested name": b"\x80\x04\x8c\x08saebench\x8c\x11formats.os.system\x93"
    + value((TOUCH,))
    + b"R.",
    "instance": START + MARK + value(TOUCH) + b"ios\nsystem\n.",
    "object": START + MARK + name("os.system") + value(TOUCH) + b"o.",
    "extension": a_pickle(b"\x82\x01"),
    "its own loader": named(call(name("saebench.formats.pickles.read_bare"), value(b""))),
    "a name that is never called": named(name("os.system")),
    "a name with an escape": named(b"c\x1b[31mos\nsystem\n"),
}
REAL = ("os.system", "eval", "python 2", "getattr", "partial", "map", "a pickle inside", "dots")

# --- pickles that misuse what they may name -----------------------------------------------------

STUB = name(CONFIG) + EMPTY + NEW


def _with_attribute(attribute: str) -> bytes:
    return named(STUB + DICT + value(attribute) + value(1) + b"s" + BUILD)


def _nested(depth: int, times: int) -> bytes:
    """Lists of which each holds the one before, in a tuple of them all."""
    steps = [LIST + b"q\x00"]
    steps += [LIST + MARK + b"h\x00" * times + b"e" + b"q\x00" for _ in range(depth)]
    return MARK + b"".join(steps) + TUPLE


def _again(function: bytes, argument: Any, *more: bytes, ends: bytes = TUPLE + CALL) -> bytes:
    """A thousand times a copy of the same argument, which the pickle holds once."""
    first, second = struct.pack("<I", 2**31), struct.pack("<I", 2**31 + 1)
    keep = function + b"r" + first + value(argument) + b"r" + second
    begins = EMPTY + NEW if ends == BUILD else MARK
    one = b"j" + first + begins + b"j" + second + b"".join(more) + ends
    return MARK + keep + one * 1_000 + TUPLE


def _hashed(depth: int) -> bytes:
    """A key whose hash takes 2 to the depth steps."""
    pairs = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))
    return a_pickle(DICT, EMPTY + pairs, value(1), b"s")


def _paths(times: int) -> bytes:
    """A path of two paths, each of which is of two, and so on."""
    path = name("pathlib.PurePosixPath")
    one = path + b"q\xf0" + value(("x",)) + CALL + b"q\xf1"
    return one + (b"h\xf0h\xf1h\xf1\x86" + CALL + b"q\xf1") * times


MISUSES: dict[str, bytes] = {
    "a path of paths": named(_paths(60)),
    "a path of numbers": named(call(name("pathlib.PosixPath"), value(1))),
    "very many tensors": named(
        LIST
        + MARK
        + tensor()
        + (name("torch._utils._rebuild_tensor_v2") + b"q\xf0" + storage() + b"q\xf1")
        + (b"h\xf0(h\xf1K\x00)" + b")\x89NtR") * 20_000
        + b"e"
    ),
    **{
        f"an attribute {one}": _with_attribute(one)
        for one in ("__class__", "__dict__", "__reduce__", "__setstate__", "__getattr__")
    },
    "a stub that is called": named(STUB + EMPTY + CALL),
    "a tensor that is called": named(tensor() + EMPTY + CALL),
    "a dtype that is called": named(name("torch.float32") + EMPTY + CALL),
    "a storage that is called": named(call(name("torch.FloatStorage"), value(10**12))),
    "a text that is called": named(value("os.system") + value((TOUCH,)) + CALL),
    "arguments that are a list": named(name("torch.Size") + LIST + CALL),
    "a function with a state": named(name("torch._utils._rebuild_tensor_v2") + DICT + BUILD),
    "a class with a state": named(name(CONFIG) + DICT + BUILD),
    "a path with a state": named(
        call(name("pathlib.PosixPath")) + value((None, {"name": 1})) + BUILD
    ),
    "a tensor with a state": named(tensor() + value((1, 2, 3, 4)) + BUILD),
    "a state that is a list": named(STUB + LIST + BUILD),
    "a state with number keys": named(STUB + value({1: 2}) + BUILD),
    "a set of lists": named(b"\x8f" + MARK + LIST + b"\x90"),
    "appended to a text": named(value("a") + value("b") + b"a"),
    "items of a list": named(LIST + value("a") + value("b") + b"s"),
    "an odd number of items": a_pickle(DICT, MARK, value("a"), b"u"),
    "a key that is a tensor": a_pickle(DICT, tensor(), value(1), b"s"),
    "a key that never hashes": _hashed(80),
    "no value": a_pickle(),
    "no mark": a_pickle(b"t"),
    "no memo": a_pickle(b"h\x07"),
    "no end": START + DICT,
    "one call, again and again": named(_again(name("torch.Size"), tuple(range(1000)))),
    "one text, again and again": named(_again(name("_codecs.encode"), "a" * 1000, value("latin1"))),
    "one state, again and again": named(
        _again(name(CONFIG), dict.fromkeys(map(str, range(1000)), 1), ends=BUILD)
    ),
    "many names, and calls": named(MARK + (name(CONFIG) + EMPTY + CALL) * 5_000 + TUPLE),
    "a huge memo": a_pickle(LIST, b"r\xff\xff\xff\xff"),
    "a huge text": a_pickle(b"\x8d" + b"\xff" * 7 + b"\x7f"),
    "huge bytes": a_pickle(b"\x8e" + b"\x00" * 5 + b"\x01\x00\x00"),
    "a huge bytearray": a_pickle(b"\x96" + b"\x00" * 5 + b"\x01\x00\x00"),
    "a huge long": a_pickle(b"\x8b\xff\xff\xff\x7f"),
    "a huge frame": START + b"\x95" + b"\xff" * 7 + b"\x7f" + DICT + STOP,
    "a text that is no UTF-8": named(b"X" + _counted(b"\xff\xfe")),
    "a lone surrogate": named(b"X" + _counted(b"\xed\xa0\x80")),
    "a deep list": a_pickle(LIST * 50_000, b"a" * 49_999),
    "a deep list, inside out": named(_nested(2_000, 1)),
    "a list that holds itself": named(LIST + b"q\x00h\x00a"),
    "a list that is huge when written out": named(_nested(60, 2)),
    "no tensors": a_pickle(DICT),
    "a number": a_pickle(value(3)),
    "a stub alone": a_pickle(STUB),
    "keys that are numbers": a_pickle(value({1: 2})),
    "a name with a line break": a_pickle(value({"a\nb": 1})),
    "a name without end": a_pickle(value({"a" * 10_000: 1})),
}


def _of_bytes(dtype: bytes, of: bytes | None = None, n: int = 2) -> bytes:
    return call(
        name("torch._utils._rebuild_tensor_v3"),
        storage() if of is None else of,
        *map(value, (0, (n,), (1,), False, None)),
        dtype,
    )


REFERENCES: dict[str, bytes] = {
    "a text": value("0") + PERSISTENT,
    "a number": value(0) + PERSISTENT,
    "a module": MARK
    + value("module")
    + name(CONFIG)
    + value("a")
    + value("b")
    + TUPLE
    + PERSISTENT,
    "nothing": EMPTY + PERSISTENT,
    "another storage": storage(key="7"),
    "a path": storage(key="../../../../etc/passwd"),
    "a key that is a number": storage(key=0),
    "more than is there": storage(n=10**15),
    "less than is there": storage(n=3),
    "below zero": storage(n=-4),
    "a length that is a text": storage(n="4"),
    "a kind that is a text": storage(kind=value("FloatStorage")),
    "a kind that is a function": storage(kind=name("torch.Size")),
    "a tensor with an offset below 0": tensor(offset=-1),
    "a tensor with an offset behind the end": tensor(offset=1),
    "a tensor of more values": tensor(shape=(5,)),
    "a tensor of huge shape": tensor(shape=(2**40, 2**40), strides=(0, 0)),
    "a tensor that is expanded far": tensor(shape=(2**24 + 1,), strides=(0,)),
    "a tensor that is the negative": tensor(None, 0, (4,), (1,), {"neg": True}),
    "a tensor that is the conjugate": tensor(None, 0, (4,), (1,), {"conj": True}),
    "a tensor with a list of lists": tensor(None, 0, (4,), (1,), [[]]),
    "an empty tensor whose strides overflow": tensor(shape=(0, *[2**20] * 15), strides=(1,) * 16),
    "a tensor of bytes of a number": _of_bytes(value(8)),
    "a tensor of bytes of more values": _of_bytes(name("torch.uint64"), n=3),
    "a tensor of negative shape": tensor(shape=(-4,)),
    "a tensor of negative strides": tensor(shape=(2, 2), strides=(-1, 1)),
    "a tensor of huge strides": tensor(shape=(2, 2), strides=(2**62, 1)),
    "a tensor of many dimensions": tensor(shape=(1,) * 100, strides=(1,) * 100),
    "a tensor of a million dimensions": tensor(shape=(2**31,) * 10**5, strides=(1,) * 10**5),
    "an empty tensor of many large dimensions": tensor(shape=(0, *[2**40] * 8), strides=(1,) * 9),
    "a tensor without strides": tensor(strides=()),
    "an empty tensor of huge shape": tensor(shape=(0, 2**63), strides=(1, 1)),
    "a tensor of truths": tensor(shape=(True,)),
    "a tensor of floats": tensor(shape=(4.0,)),
    "a tensor of nothing": tensor(of=value(None)),
    "a tensor of a tensor": tensor(of=tensor()),
    "a tensor without arguments": call(name("torch._utils._rebuild_tensor_v2")),
    "a parameter of a number": call(name("torch._utils._rebuild_parameter"), value(1)),
    "a type that calls": call(
        name("torch._tensor._rebuild_from_type_v2"),
        name("torch.Size"),
        name("torch.Tensor"),
        value(((1,),)),
        value(None),
    ),
}

# --- tensors that are no plain ones, saved by torch ---------------------------------------------


def _saved(content: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def _kinds() -> dict[str, bytes]:
    floats = torch.ones(2, 2)
    indices = torch.tensor([[0], [1]])
    sparse = torch.sparse_coo_tensor(indices, torch.ones(1), (10**9, 10**9), check_invariants=True)
    kinds = {
        "sparse": sparse,
        "without values": torch.empty(2**40, device="meta"),
        "expanded": torch.ones(1).expand(2**40),
        "negated": torch._neg_view(torch.ones(2)),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "a scalar of NumPy that is a text": np.str_("a"),
        "an array of NumPy": np.ones(2),
        "a module": torch.nn.Linear(2, 2),
    }
    found = {f"{kind}": _saved({"w": one}) for kind, one in kinds.items()}
    return found | {"a tensor alone": _saved(floats), "a list": _saved([floats])}


# --- archives -----------------------------------------------------------------------------------

GOOD = named(tensor())


def _changed(data: bytes, old: bytes, new: bytes, which: int = 0) -> bytes:
    """One occurrence replaced: local headers come first, the directory last."""
    parts = data.split(old)
    at = which if which >= 0 else len(parts) - 1 + which
    assert 0 <= at < len(parts) - 1
    return old.join(parts[: at + 1]) + new + old.join(parts[at + 1 :])


def _twice() -> bytes:
    file = io.BytesIO(zipped(GOOD))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/data.pkl", PROGRAMS["os.system"])
    return file.getvalue()


def _patched(at: int, new: bytes, signature: bytes = b"PK\x01\x02", which: int = 1) -> bytes:
    """An archive with bytes of the n-th header of a kind replaced."""
    data, start = bytearray(zipped(GOOD)), -1
    for _ in range(which + 1):
        start = data.index(signature, start + 1)
    data[start + at : start + at + len(new)] = new
    return bytes(data)


def _many(n: int) -> bytes:
    """An archive with so many members more, all of them the last."""
    data = zipped(GOOD)
    start, last, end = (data.index(b"PK\1\2"), data.rindex(b"PK\1\2"), data.index(b"PK\5\6"))
    others = (data[last:end].replace(b"data/0", b"%06d" % i) for i in range(n))
    directory = data[start:end] + b"".join(others)
    size = struct.pack("<I", len(directory))
    return data[:start] + directory + data[end : end + 12] + size + data[end + 16 :]


def _bomb(size: int, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
        shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({size // 4},), }}"
        with archive.open("W_enc.npy", "w") as member:
            member.write(header + shape.ljust(117).encode() + b"\n")
            for _ in range(size // 2**20):
                member.write(bytes(2**20))
    return file.getvalue()


@cache
def _archives() -> dict[str, bytes]:
    script = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.ones(1)), script)
    plain = zipped(GOOD)
    return {
        "a compressed member": zipped(GOOD, compression=zipfile.ZIP_DEFLATED),
        "two members of one name": _twice(),
        "a part of a value": zipped(
            named(_of_bytes(name("torch.uint64"), storage(name("torch.ByteStorage"), n=15), n=1)),
            {"data/0": STORED[:15]},
        ),
        "very many members": _many(20_000),
        "a directory of megabytes": _many(80_000),
        "no data.pkl": zipped(GOOD).replace(b"data.pkl", b"data.xyz"),
        "two data.pkl": zipped(GOOD, {"other/data.pkl": GOOD, "data/0": STORED}),
        "no storage": zipped(GOOD, {}),
        "a storage that is too short": zipped(GOOD, {"data/0": STORED[:8]}),
        "a big-endian archive": zipped(GOOD, {"data/0": STORED, "byteorder": b"big"}),
        "TorchScript": script.getvalue(),
        "a member larger than the file": _patched(20, struct.pack("<II", 2**31, 2**31)),
        "a member of other sizes": _patched(24, struct.pack("<I", 2**31)),
        "a member outside the file": _patched(42, struct.pack("<I", 2**31)),
        "a member that is another": _patched(42, struct.pack("<I", 0)),
        "a local header of another name": _patched(30, b"zrchive", b"PK\x03\x04"),
        "a local header that says compressed": _patched(8, b"\x08", b"PK\x03\x04"),
        "a directory that says compressed": _patched(10, b"\x08"),
        "a directory elsewhere": _patched(16, struct.pack("<I", 2**31), b"PK\x05\x06", 0),
        "a prefix": b"GIF89a" + plain,
        "a document": zipped(b"", {"word/document.xml": b"<x/>"}).replace(b"data.pkl", b"mimetype"),
        "leaves its folder": zipped(named(tensor(storage(key="../0"))), {"../0": STORED}),
        "a bomb": _bomb(2**26 + 2**20),
        "a bomb of bzip2": _bomb(2**26 + 2**20, zipfile.ZIP_BZIP2),
        "a gzip bomb": gzip.compress(bytes(2**26 + 1)),
        "gzip, cut": gzip.compress(GOOD)[:-6],
        "gzip of nothing": gzip.compress(b""),
        "gzip, damaged": _changed(
            gzip.compress(GOOD * 9), gzip.compress(GOOD * 9)[20:24], b"\xff" * 4
        ),
        "zip in name only": b"PK\x03\x04" + b"\x00" * 100,
        "an empty archive": b"PK\x05\x06" + b"\x00" * 18,
        "legacy: keys of others": legacy(GOOD, ("1",)),
        "legacy: no keys": legacy(GOOD, ()),
        "legacy: a key twice": legacy(GOOD, ("0", "0")),
        "legacy: another length": legacy(GOOD, stored=struct.pack("<q", 2**60) + STORED),
        "legacy: too short": legacy(GOOD, stored=struct.pack("<q", 4) + STORED[:7]),
        "legacy: huge": legacy(named(tensor(storage(n=2**50), shape=(2**50,)))),
        "legacy: big-endian": legacy(GOOD).replace(
            b"little_endian" + b"q\x02\x88", b"little_endian" + b"q\x02\x89"
        ),
        "legacy: an old tar archive": b"pickle".ljust(512, b"\0") * 4,
        "saev: no archive": b'{"schema": 5}\nnothing',
        "saev: a line without end": b'{"schema": "' + b"a" * 2**21,
        "saev: a key twice": b'{"schema": 5, "schema": 4}\n' + plain,
        "saev: a list": b'{"a": [}\n' + plain,
        "saev: deep": b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}\n" + plain,
        "saev: deep enough": b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}\n" + plain,
        "saev: a number without end": b'{"a": ' + b"9" * 10_000 + b"}\n" + plain,
        "saev: no UTF-8": b'{"a": "\xff"}\n' + plain,
    }


# --- safetensors --------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = STORED) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any = (4,), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _safetensors() -> dict[str, bytes]:
    good = save({"a": torch.ones(4)})
    same = b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    return {
        "a header longer than the file": struct.pack("<Q", 10**7) + b"{" + b" " * 100,
        "a header of exabytes": struct.pack("<Q", 2**63) + b"{}",
        "a header that is cut": good[:40],
        "a header that is a list": safetensors(b"{[]"),
        "a header that is deep": safetensors(b'{"a":' + b"[" * 100_000),
        "tensors that are cut": good[:-1],
        "bytes behind": good + b"\0",
        "overlap": safetensors({"a": entry(), "b": entry((2,), (8, 16))}),
        "the same bytes": safetensors({"a": entry(), "b": entry()}),
        "a gap": safetensors({"a": entry((1,), (0, 4)), "b": entry((2,), (8, 16))}),
        "a start that is not 0": safetensors({"a": entry((3,), (4, 16))}),
        "offsets turned round": safetensors({"a": entry(offsets=(16, 0))}),
        "negative offsets": safetensors({"a": entry(offsets=(-16, 0))}),
        "offsets of floats": safetensors({"a": entry(offsets=(0, 16.0))}),
        "offsets of truths": safetensors({"a": entry(offsets=(False, 16))}),
        "three offsets": safetensors({"a": entry(offsets=(0, 8, 16))}),
        "offsets that are a text": safetensors({"a": entry(offsets="ab")}),
        "a shape that is larger": safetensors({"a": entry((5,))}),
        "a shape that is smaller": safetensors({"a": entry((3,))}),
        "a huge shape": safetensors({"a": entry((2**62, 2**62))}),
        "a shape that overflows to its size": safetensors({"a": entry((2**33, 2**31 + 4))}),
        "a negative shape": safetensors({"a": entry((-2, -2))}),
        "a shape of floats": safetensors({"a": entry((4.0,))}),
        "a shape that is a number": safetensors({"a": entry(4)}),
        "an unknown dtype": safetensors({"a": entry(dtype="Q32")}),
        "a dtype that is a list": safetensors({"a": entry(dtype=["F32"])}),
        "very many tensors": safetensors({f"{i}": entry((0,), (0, 0)) for i in range(20_001)}, b""),
        "an entry that is a list": safetensors({"a": [1]}),
        "an entry without shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 16]}}),
        "a key twice": safetensors(b"{" + same + b"," + same + b"}"),
        "many keys twice": safetensors(b"{" + b",".join([same] * 50_000) + b"}"),
        "metadata of numbers": safetensors({"a": entry(), "__metadata__": {"format": 1}}),
        "metadata that are a list": safetensors({"a": entry(), "__metadata__": ["saebench"]}),
        "a name with an escape": safetensors({"\x1b[2J": entry()}),
        "no tensors": safetensors({}, b""),
        "our metadata and nothing else": safetensors({"__metadata__": {"format": "saebench"}}, b""),
        "a config that is a list": _ours("[]"),
        "a config of other kinds": _ours('{"architecture": ["topk"], "d_model": {}, "k": "x"}'),
        "a config that is deep": _ours("[" * 100_000),
    }


def _ours(config: str) -> bytes:
    metadata = {"format": "saebench", "version": "2", "config": config}
    return safetensors({"a": entry(), "__metadata__": metadata})


# --- NumPy archives -----------------------------------------------------------------------------


def npz(header: str, data: bytes = STORED, version: bytes = b"\x01\x00") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        text = header.encode() + b"\n"
        length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
        archive.writestr("W_enc.npy", b"\x93NUMPY" + version + length + text + data)
    return file.getvalue()


def _deflated_short() -> bytes:
    """A deflated member of fewer bytes than it says, whose checksum is that of what is there."""
    claimed = npz(array(shape="(2000,)"), b"")
    short = zipfile.ZipFile(io.BytesIO(claimed)).read("W_enc.npy") + STORED
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", short)
    data = bytearray(whole.getvalue())
    n = struct.pack("<I", len(short) - len(STORED) + 8000)
    data[22:26] = n
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = n
    return bytes(data)


def array(descr: str = "'<f4'", shape: str = "(4,)", fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


def _npz() -> dict[str, bytes]:
    objects = io.BytesIO()
    np.savez(objects, W_enc=np.array([print], dtype=object))
    return {
        "objects": objects.getvalue(),
        "objects of size 0": npz(array("'|O'", "(0,)"), b""),
        "more than is there": npz(array(shape="(5,)")),
        "less than is there": npz(array(shape="(3,)")),
        "exabytes": npz(array(shape=f"({2**60},)")),
        "a shape that overflows": npz(array(shape=f"({2**63}, {2**63})")),
        "a negative shape": npz(array(shape="(-1,)")),
        "nothing, often": npz(array("'|V0'", f"({2**40},)"), b""),
        "texts": npz(array("'<U1'", "(4,)")),
        "records": npz(array("[('a', '<f4')]")),
        "dates": npz(array("'<M8[s]'", "(2,)")),
        "a header that is a program": npz("__import__('os').system('touch ran')"),
        "a header that is long": npz(array() + " " * 60_000),
        "a header that is deep": npz("(" * 9_000),
        "another version": npz(array(), version=b"\x09\x00"),
        "no magic": zipped(b"").replace(b"data.pkl", b"data.npy").replace(b"data/0", b"a.npy."),
        "cut": npz(array())[:-30],
        "deflated, and ends early": _deflated_short(),
    }


# --- all of them --------------------------------------------------------------------------------

HARMLESS = {"a huge frame", "many names, and calls", "no tensors", "a stub alone", "operation 0x7d"}
"""What is taken out of its container, and is of no format: nothing, by other means."""


def _attacks() -> dict[str, bytes]:
    misuses = {**MISUSES, **{f"refers to {what}": named(one) for what, one in REFERENCES.items()}}
    held = {f"{how}: {what}": HOLDERS[how](PROGRAMS[what]) for how in HOLDERS for what in PROGRAMS}
    for how in ("archive", "legacy", "bare", "inside"):
        held |= {f"{how}: {what}": HOLDERS[how](misuses[what]) for what in misuses}
    held["bare: very many steps"] = a_pickle(LIST * 600_000)
    operations = {f"operation {op:#04x}": bytes([0x80, 2, op]) + STOP for op in range(256)}
    kinds = {f"a tensor that is {what}": data for what, data in _kinds().items()}
    more = {"zip": _archives(), "safetensors": _safetensors(), "npz": _npz()}
    others = {f"{how}: {what}": data for how in more for what, data in more[how].items()}
    return {**held, **operations, **kinds, **others}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(read: Callable[[Path], object], path: Path) -> SaebenchError | None:
    try:
        read(path)
    except SaebenchError as error:
        return error
    return None


@contextmanager
def little_memory() -> Iterator[None]:
    """At most `ROOM` more than this process has."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


ROOM = 2**28  # bytes that reading any of them may take: a bomb is stopped at 2**26


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.jit")
def test_every_attack_is_refused_in_words_and_runs_nothing(here: Path) -> None:
    path, wrong, taken = here / "sae.pt", [], set()
    attacks = _attacks()
    with little_memory():
        for what, data in attacks.items():
            path.write_bytes(data)
            start = time.monotonic()
            error = refusal(read_sae, path)
            said = isinstance(error, WeightsError) and str(path) in error.what and error.hint
            if not said or time.monotonic() - start > 10:
                wrong.append((what, error))
            elif "is of no known SAE format" in error.what:
                taken.add(what.rpartition(": ")[2])
    assert not wrong
    assert taken == HARMLESS
    assert os.listdir(here) == [path.name]


@pytest.mark.parametrize("how", HOLDERS)
def test_programs_are_refused_by_name(how: str, here: Path) -> None:
    path = here / "sae.pt"
    for what, program in PROGRAMS.items():
        path.write_bytes(HOLDERS[how](program))
        with pytest.raises(WeightsError) as caught:
            read_sae(path)
        if what not in ("instance", "extension"):
            assert "needs code to be read" in caught.value.what, what
    path.write_bytes(HOLDERS[how](PROGRAMS["getattr"]))
    with pytest.raises(WeightsError, match=r"builtins\.getattr, builtins\.__import__"):
        read_sae(path)


@pytest.mark.parametrize("what", REAL)
def test_the_programs_are_real(what: str, here: Path) -> None:
    """What these tests refuse does run where Python's own reader reads it."""
    pickle.loads(PROGRAMS[what])
    assert (here / RAN).exists()


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.jit")
def test_what_is_not_supported_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    misuses = [REFERENCES[f"a tensor that is the {what}"] for what in ("negative", "conjugate")]
    kinds, archives = _kinds(), _archives()
    files = [
        *map(zipped, map(named, [*misuses, REFERENCES["a tensor that is expanded far"]])),
        *(
            kinds[what]
            for what in ("negated", "conjugated", "expanded", "a scalar of NumPy that is a text")
        ),
        *(archives[f"a {what}"] for what in ("compressed member", "big-endian archive")),
        *(archives[what] for what in ("very many members", "legacy: big-endian")),
        *(_npz()[what] for what in ("objects", "texts", "records", "dates")),
        _safetensors()["very many tensors"],
        a_pickle(DICT, value((1, 2)), value(1), b"s"),
        a_pickle(b"\x91"),
    ]
    for data in files:
        path.write_bytes(data)
        error = refusal(read_sae, path)
        assert error is not None
        assert "is not read: " in error.what
        assert "damaged" not in f"{error.what}{error.hint}"


# --- files that are no weights, or no files -------------------------------------------------------


def test_a_pipe_a_device_and_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(WeightsError, match="is no file"):
            read_sae(path)


def test_a_pickle_that_would_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "sae.pkl"
    path.write_bytes(a_pickle(DICT))
    os.truncate(path, 2**40)  # takes no room on the disk
    with pytest.raises(WeightsError, match="1,099,511,627,776 bytes"):
        read_sae(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    path.write_bytes(zipped(GOOD))
    path.chmod(0)
    with pytest.raises(WeightsError, match="Permission denied"):
        read_sae(path)


@pytest.mark.parametrize("said", ["a\0b", "a" * 5000])
def test_a_path_that_no_system_has(said: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        read_sae(tmp_path / said)


# --- configurations -------------------------------------------------------------------------------

LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
CONFIGS: dict[str, tuple[str, bytes]] = {
    "JSON that is deep": ("config.json", b"[" * 100_000),
    "JSON that is deep enough": ("config.json", b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}"),
    "JSON with a key twice": ("config.json", b'{"k": 1, "k": 2}'),
    "JSON that is a list": ("config.json", b"[]"),
    "JSON that is no UTF-8": ("config.json", b'{"k": "\xff"}'),
    "JSON with a number without end": ("config.json", b'{"k": ' + b"1" * 5000 + b"}"),
    "a text": ("config.json", b"<html>"),
    "nothing": ("config.json", b""),
    "YAML of aliases": ("config.yaml", b"a0: &a0 [lol]\n" + LAUGHS.encode()),
    "YAML that merges": ("config.yaml", b"a: &a {k: 1}\nb:\n  <<: *a\n"),
    "YAML with a key twice": ("config.yaml", b"k: 1\nk: 2\n"),
    "YAML that builds": ("config.yaml", f"k: !!python/object/apply:os.system ['{TOUCH}']".encode()),
    "YAML that names": ("config.yaml", b"k: !!python/name:os.system"),
    "YAML that holds itself": ("config.yaml", b"k: &a [*a]"),
    "YAML that is deep": ("config.yaml", b"[" * 1000),
    "YAML that is a list": ("config.yaml", b"- 1"),
    "YAML with a key that is a list": ("config.yaml", b"? [1]\n: 2"),
    "YAML with a date that is none": ("config.yaml", b"k: 2020-99-99"),
    "YAML that is no UTF-8": ("config.yaml", b"k: \xff"),
    "YAML of megabytes": ("config.yaml", b"# comment\n" * 100_000),
    "JSON of gigabytes": ("config.json", b"huge"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configurations_that_were_made_to_do_harm(what: str, here: Path) -> None:
    file, data = CONFIGS[what]
    (here / file).write_bytes(data)
    if data == b"huge":
        os.truncate(here / file, 2**33)
    with pytest.raises(WeightsError) as caught:
        read_config(here / file)
    assert str(here / file) in caught.value.what
    assert os.listdir(here) == [file]


def test_yaml_may_repeat_itself_a_little(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("betas: &id001 [0.9, 0.999]\nsame: *id001\nk: 8\n")
    assert read_config(path) == {"betas": [0.9, 0.999], "same": [0.9, 0.999], "k": 8}


# --- what is read ---------------------------------------------------------------------------------


class Config:
    """As a project's own class: it is pickled whole."""

    def __init__(self) -> None:
        self.d_in = 8
        self.path = Path("a/b")
        self.dtype = torch.float32
        self.device = torch.device("cuda", 1)
        self.betas = (0.9, 0.999)
        self.names: list[Any] = ["a", None, True, -3, 2**40, 1.5, {"deep": {1: 2}}]


def content() -> dict[str, Any]:
    base = torch.arange(24.0).reshape(4, 6)
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 2)
    return {
        "cfg": Config(),
        "plain": base,
        "transposed": base.T,
        "part": base[1:3, 2:4],
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "whole": torch.arange(3),
        "truth": torch.tensor([True, False]),
        "number": torch.tensor(3.0),
        "none": torch.zeros(0, 3),
        "parameter": linear.weight,
        "state": linear.state_dict(),
    }


def _written(how: str, path: Path) -> None:
    if how == "archive":
        torch.save(content(), path)
    elif how == "legacy":
        torch.save(content(), path, _use_new_zipfile_serialization=False)
    elif how == "saev":
        path.write_bytes(b'{"schema": 5}\n' + _saved(content()))
    elif how == "gzip of an archive":
        path.write_bytes(gzip.compress(_saved(content())))
    else:
        protocol = int(how.rpartition(" ")[2])
        data = pickle.dumps(content(), protocol)
        path.write_bytes(gzip.compress(data) if how.startswith("gzip") else data)


@pytest.mark.parametrize(
    "how",
    [
        "archive",
        "legacy",
        "saev",
        "gzip of an archive",
        *(f"pickle {i}" for i in (2, 3, 4, 5)),
        "gzip 4",
    ],
)
def test_what_torch_and_pickle_write_is_read_to_the_bit(how: str, tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    _written(how, path)
    found, expected = sniff(path).objects, content()
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            assert found[key].dtype == tensor.dtype
            assert found[key].shape == tensor.shape
            assert torch.equal(found[key], tensor)
    assert torch.equal(found["state"]["bias"], expected["state"]["bias"])
    assert sniff(path).nested("cfg") == {
        "d_in": 8,
        "path": "a/b",
        "dtype": "torch.float32",
        "device": "cuda:1",
        "betas": (0.9, 0.999),
        "names": ["a", None, True, -3, 2**40, 1.5, {"deep": {"1": 2}}],
    }


def test_tensors_that_share_a_storage_share_it(tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    torch.save({"plain": (base := torch.ones(3, 4)), "transposed": base.T}, path)
    found = sniff(path).tensors
    assert found["plain"].data_ptr() == found["transposed"].data_ptr()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", "|b1"])
def test_numpy_arrays_of_any_order(dtype: str, order: Any, tmp_path: Path) -> None:
    path, expected = tmp_path / "params.npz", np.arange(6).reshape(2, 3).astype(dtype, order=order)
    np.savez(path, a=expected, none=np.zeros((0, 2), dtype))
    found = sniff(path).objects
    np.testing.assert_array_equal(found["a"].numpy(), expected)
    assert found["none"].shape == (0, 2)


@pytest.mark.parametrize("cut", range(0, 100, 7))
def test_files_cut_anywhere(cut: int, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(40), "b": torch.zeros(3, 4)}
    arrays = io.BytesIO()
    np.savez(arrays, a=np.ones(40))
    whole = {
        "archive": _saved(tensors),
        "legacy": _saved(tensors, _use_new_zipfile_serialization=False),
        "pickle": pickle.dumps(tensors),
        "gzip": gzip.compress(pickle.dumps(tensors)),
        "safetensors": save(tensors),
        "saev": b'{"schema": 5}\n' + _saved(tensors),
        "npz": arrays.getvalue(),
    }
    path = tmp_path / "sae"
    for data in whole.values():
        path.write_bytes(data[: len(data) * cut // 100])
        with pytest.raises(WeightsError) as caught:
            _ = sniff(path).objects
        assert caught.value.hint
