"""What `torch.load` reads of weights is read alike: the same values, dtypes and shapes.

Of the kinds of tensors that `torch.save` may meet, in both of its containers, and in pickles.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saebench.formats import pickles

PROTOCOLS = (2, 3, 4, 5)
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.complex64, torch.complex128),
)
OF_BYTES = (
    *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)
"""Kinds without a storage of their own: torch writes them to a legacy file, and cannot read it."""


def _with_attribute(tensor: Tensor) -> Tensor:
    tensor.mark = "x"  # type: ignore[attr-defined]
    return tensor


def _training() -> dict[str, Any]:
    """A checkpoint with an optimizer and a scheduler."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 3,
    }


def _views() -> dict[str, Tensor]:
    base = torch.randn(6, 8)
    return {
        "whole": base,
        "transposed": base.T,
        "columns": base[:, ::2],
        "rows": base[1:3],
        "part": base.view(-1)[40:],
        "strided": torch.as_strided(base, (3, 2), (1, 7), 2),
        "permuted": base.view(2, 3, 8).permute(2, 0, 1),
        "a step that is never taken": torch.as_strided(base, (1, 8), (2**40, 1), 8),
    }


def _repeating() -> dict[str, Tensor]:
    return {
        "a number": torch.tensor(2.0).expand(8),
        "a column": torch.arange(3.0)[:, None].expand(3, 4),
        "a row": torch.arange(4.0).expand(3, 4),
        "windows": torch.arange(10.0).unfold(0, 4, 1),
        "of few": torch.as_strided(torch.arange(8.0), (2, 2), (1, 1)),
    }


CONTENTS: dict[str, Callable[[], Any]] = {
    "parameters": lambda: {
        "plain": torch.nn.Parameter(torch.randn(2, 3)),
        "fixed": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "with an attribute": _with_attribute(torch.nn.Parameter(torch.randn(2))),
        "a tensor with one": _with_attribute(torch.randn(2)),
        "with a gradient": torch.randn(2).requires_grad_(),
        "a buffer": torch.nn.Buffer(torch.randn(2)),
    },
    "a state dict": lambda: torch.nn.BatchNorm1d(3).state_dict(),  # an OrderedDict with _metadata
    "an ordered one": lambda: OrderedDict(b=torch.ones(1), a=torch.zeros(1)),
    "a training checkpoint": _training,
    "views of one storage": _views,
    "values that repeat": _repeating,
    "scalars": lambda: {"whole": torch.tensor(3), "real": torch.tensor(2.5)},
    "empty": lambda: {f"{shape}": torch.empty(shape) for shape in ((0,), (0, 5), (3, 0, 2))},
    "dtypes": lambda: {f"{dtype}": torch.arange(4).to(dtype) for dtype in DTYPES},
    "plain values": lambda: {
        "w": torch.ones(1),
        "size": torch.Size([2, 3]),
        "dtypes": [torch.float32, torch.bfloat16, torch.uint16],
        "counter": Counter("aab"),
        "numbers": [None, True, 2**70, -5, 1e300, float("inf")],
        "texts": ["é" * 300, "x" * 70_000, ""],
        "nested": {"a": [1, (2, (3, 4, 5, 6))], 0: {1: {}}},
        "set": {1, 2},
    },
}


def shown(value: Any) -> Any:
    """The same with tensors as what compares equal, bit for bit."""
    if isinstance(value, Tensor):
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        return str(value.dtype), tuple(value.shape), bits
    if isinstance(value, dict):
        return [(key, shown(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [shown(part) for part in value]
    return value


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 3")
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", CONTENTS)
def test_what_torch_reads_is_read_alike(
    content: str, zipped: bool, protocol: int, tmp_path: Path
) -> None:
    path, saved = tmp_path / "weights.pt", CONTENTS[content]()
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    # It does not read later protocols without code; these files are our own.
    theirs = torch.load(path, weights_only=protocol < 4)
    assert shown(pickles.read_torch(path)) == shown(theirs) == shown(saved)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("content", CONTENTS)
def test_what_python_reads_is_read_alike(content: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(CONTENTS[content](), protocol))
    with path.open("rb") as file:
        assert shown(pickles.read_bare(file, path)) == shown(pickle.loads(path.read_bytes()))


@pytest.mark.parametrize("dtype", OF_BYTES)
def test_kinds_that_have_no_storage_of_their_own(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    whole = torch.arange(12).to(dtype)
    saved = {"whole": whole, "part": whole.view(3, 4)[1:, ::2], "none": whole[:0]}
    torch.save(saved, path)
    assert shown(pickles.read_torch(path)) == shown(torch.load(path)) == shown(saved)
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    assert shown(pickles.read_torch(path)) == shown(saved)


def test_tensors_that_repeat_values_have_their_own(tmp_path: Path) -> None:
    """Writing into one changes one value, as it does in any weights."""
    path = tmp_path / "weights.pt"
    for zipped in (True, False):
        torch.save(_repeating(), path, _use_new_zipfile_serialization=zipped)
        for key, tensor in pickles.read_torch(path).items():
            expected = _repeating()[key].clone()
            tensor[..., 0] += 1
            expected[..., 0] += 1
            assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    "left_out", ["byteorder", ".format_version", ".storage_alignment", "/.data/"]
)
def test_records_that_older_versions_do_not_write(left_out: str, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.pt", tmp_path / "weights.pt"
    torch.save(saved := _views(), whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            if left_out not in info.filename:
                target.writestr(info.filename, source.read(info))
    assert shown(pickles.read_torch(path)) == shown(torch.load(path)) == shown(saved)


@pytest.mark.parametrize("alignment", [64, 4096, 65536])
def test_storages_that_are_aligned(alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with torch.utils.serialization.config.patch("save.storage_alignment", alignment):
        torch.save(saved := _views(), path)
    assert shown(pickles.read_torch(path)) == shown(torch.load(path)) == shown(saved)
