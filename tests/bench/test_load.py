"""How much slower than touching its bytes is loading a checkpoint of 768 x 24,576?

    pytest tests/bench/test_load.py -m bench -n 0 --benchmark-enable -s

The bytes are copied from the file, hashed and checked for NaN, the last in two ways: as it is
usually written (`isfinite`), and by the extremes, as saebench does. Loading hashes too.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench.checkpoints import LAYOUTS, load, make
from tests.bench.setting import Interleaved
from tests.bench.test_speed import report

pytestmark = pytest.mark.bench

S = 24_576


def copied(path: Path) -> torch.Tensor:
    """The bytes of a file, hashed, as float32."""
    data = torch.empty(path.stat().st_size, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.readinto(data.numpy().data)  # type: ignore[attr-defined]
    hashlib.sha256(data.numpy().data).hexdigest()
    return data[: len(data) // 4 * 4].view(torch.float32)


def usual(path: Path) -> bool:
    return bool(torch.isfinite(copied(path)).all())


def fastest(path: Path) -> bool:
    return all(math.isfinite(value) for value in copied(path).aminmax())


def hashed_and_loaded(path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256").hexdigest()
    load(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loading(benchmark: Any, layout: str, tmp_path: Path) -> None:
    """At most 1.3 times copying, hashing and checking the bytes."""
    made = make(S)
    path = LAYOUTS[layout](tmp_path, made)
    loaded = load(path)
    for name, tensor in made.tensors.items():  # what is timed is the whole of it
        assert torch.equal(loaded.tensors[name], tensor)
    assert usual(path)
    assert fastest(path)
    del loaded
    rounds = Interleaved(
        bytes=lambda: usual(path),
        fastest=lambda: fastest(path),
        load=lambda: hashed_and_loaded(path),
        unhashed=lambda: load(path),
    )
    report(benchmark, f"{layout}, {path.stat().st_size / 2**20:.0f} MiB", rounds, 7)
