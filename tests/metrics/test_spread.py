"""Σ‖e − ē‖² in one stream, where nothing is known of the mean beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.metrics.spread import Spread, moved, spread_terms


def drawn(n: int, offset: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[n 6] float32 around an offset, and [n 500] weights."""
    generator = torch.Generator().manual_seed(seed)
    weights_br = torch.randint(0, 4, (n, 500), generator=generator).double()
    return torch.randn(n, 6, generator=generator) + offset, weights_br


def streamed(e_nd: Tensor, weights_nr: Tensor, stops: list[int], batch: int) -> Spread:
    """Segments that end at `stops`, each with its first vector as pilot, merged."""
    whole, start = Spread(), 0
    for stop in [*stops, len(e_nd)]:
        segment, pilot_d = Spread(), e_nd[start].double()
        for low in range(start, stop, batch):
            part = slice(low, min(low + batch, stop))
            segment.add(pilot_d.numpy(), spread_terms(e_nd[part], pilot_d, weights_nr[part]))
        whole.merge(segment.state())
        start = stop
    return whole


@pytest.mark.parametrize("offset", [0.0, 50.0, 1e4])
@pytest.mark.parametrize(("stops", "batch"), [([], 90), ([], 7), ([20, 50], 8), ([1, 2], 90)])
def test_equals_numpy_for_any_partition(offset: float, stops: list[int], batch: int) -> None:
    e_nd, weights_nr = drawn(90, offset)
    found, found_r = streamed(e_nd, weights_nr, stops, batch).centred()
    e = e_nd.double().numpy()
    assert found == pytest.approx(((e - e.mean(0)) ** 2).sum(), rel=1e-12)
    for r in (0, 123, 499):
        w = weights_nr[:, r].numpy()
        mean_d = (w[:, None] * e).sum(0) / w.sum()
        expected = (w[:, None] * (e - mean_d) ** 2).sum()
        assert found_r[r] == pytest.approx(expected, rel=1e-11)


def test_plain_sums_would_lose_it() -> None:
    """Without a pilot, at this mean, seven of sixteen digits are gone."""
    e = drawn(90, 1e4)[0].double().numpy()
    plain = (e**2).sum() - (e.sum(0) ** 2).sum() / len(e)
    assert plain != pytest.approx(((e - e.mean(0)) ** 2).sum(), rel=1e-11)


def test_a_fresh_part_merged_with_a_state_is_that_part() -> None:
    whole = streamed(*drawn(40, 3.0), [10], 4)
    fresh = Spread()
    fresh.merge(whole.state())
    for name, array in whole.state().items():
        np.testing.assert_array_equal(fresh.state()[name], array)
    fresh.merge(Spread().state())
    assert fresh.n == 40


def test_moving_the_pilot() -> None:
    e_nd, weights_nr = drawn(30, 0.0)
    a, b = torch.zeros(6).double(), torch.arange(6).double()
    around_a, around_b = (spread_terms(e_nd, p, weights_nr) for p in (a, b))
    for field in ("totals_gq", "replicates_grq"):
        found = moved(getattr(around_b, field)[0], (b - a).numpy())
        np.testing.assert_allclose(found, getattr(around_a, field)[0], rtol=1e-12, atol=1e-9)


def test_equal_vectors_have_no_spread() -> None:
    e_nd = torch.full((20, 6), 0.1)
    assert streamed(e_nd, torch.ones(20, 500).double(), [5], 3).centred()[0] == 0
    assert Spread().n == 0
