"""Partial states: kept to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from saebench.segments import SegmentStore

STATE = {
    "fvu/sum": np.array([0.1, np.nextafter(1, 2), -0.0, np.inf, np.nan, 5e-324]),
    "fvu/n": np.array(2**62 + 1),
    "alive/first": np.arange(12, dtype=np.int64).reshape(3, 4).T,  # not contiguous
    "alive/mask": np.array([True, False]),
    "top/empty": np.zeros((0, 16), dtype=np.float32),
}


def same_bits(a: dict[str, np.ndarray] | None, b: dict[str, np.ndarray]) -> bool:
    return a is not None and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].tobytes() == b[name].tobytes()
        for name in {**a, **b}
    )


def test_every_bit_comes_back(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path / "_partial")
    store.save("u", 3, STATE)
    assert same_bits(store.load("u", 3), STATE)


def test_segments_and_discard(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path / "_partial")
    assert store.segments("u") == set()
    assert store.load("u", 0) is None
    for segment in (0, 7, 1_000_000):
        store.save_many(segment, {"u": STATE, "v": STATE})
    assert store.segments("u") == store.segments("v") == {0, 7, 1_000_000}
    store.discard("u")
    store.discard("never there")
    assert store.segments("u") == set()
    assert store.segments("v") == {0, 7, 1_000_000}


def test_a_state_is_replaced(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path)
    store.save("u", 0, STATE)
    store.save("u", 0, {"n": np.array(1)})
    assert same_bits(store.load("u", 0), {"n": np.array(1)})


def test_only_numbers_can_be_kept(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'ids' is an array of <U1"):
        SegmentStore(tmp_path).save("u", 0, {"ids": np.array(["a"])})
