"""The formulas of other projects against their published values."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from saebench.metrics.substitution_conventions import (
    Losses,
    dictionary_learning,
    hugofry,
    kissane,
    prisma,
    ratio_of_means,
)

# Two batches: clean, spliced, zero.
TWO = Losses(np.array([1, 3.0]), np.array([2, 3.2]), np.array([10, 3.5]))


def test_the_vector_of_two_batches() -> None:
    assert dictionary_learning(TWO) == pytest.approx(0.7444444, abs=5e-8)
    assert kissane(TWO) == pytest.approx(0.7444444, abs=5e-8)
    assert ratio_of_means(TWO) == pytest.approx(0.8736842, abs=5e-8)
    assert hugofry(TWO) == pytest.approx(0.2555556, abs=5e-8)
    assert 1 - ratio_of_means(TWO) == pytest.approx(0.1263158, abs=5e-8)  # of means


def losses(clean: float, spliced: float, zero: float) -> Losses:
    return Losses(np.array([clean]), np.array([spliced]), np.array([zero]))


def test_prisma_s_notebook() -> None:
    of_notebook = losses(6.762171, 6.762009, 6.772939)
    assert prisma(of_notebook) == pytest.approx(101.49503, abs=5e-6)
    assert round(prisma(of_notebook), 2) == pytest.approx(101.496, abs=0.005)
    assert ratio_of_means(of_notebook) == pytest.approx(1.0150446, abs=5e-8)


def test_saebench_s_fixture() -> None:
    assert ratio_of_means(losses(4.6936, 4.7141, 13.0766)) == pytest.approx(0.9975546, abs=5e-8)


STORED = [  # a project's formula; mean losses clean, spliced, zero; its stored value; our formula's
    (dictionary_learning, (3.33613, 3.84045, 13.25166), 0.94898, 0.9491384),  # TopK
    (dictionary_learning, (3.33613, 5.20820, 13.25166), 0.81062, 0.8111982),  # AutoEncoder
    (kissane, (3.13821, 10.12013, 12.45293), 0.25321, 0.25044),  # gemma-it ← base SAE
    (kissane, (2.11674, 98.30400, 12.45293), -8.32143, -8.30587),  # gemma ← it SAE
]


@pytest.mark.parametrize(("formula", "means", "stored", "of_means"), STORED)
def test_what_is_stored_is_no_ratio_of_means(
    formula: Callable[[Losses], float],
    means: tuple[float, float, float],
    stored: float,
    of_means: float,
) -> None:
    """The batches behind these values are not published, so they cannot be computed again.

    What can be shown: the published means do not give the stored value, not even with all that
    their rounding hides; and there are batches with these means, whose losses lie within 1 nat of
    each other's mean, for which the project's formula gives it.
    """
    assert ratio_of_means(losses(*means)) == pytest.approx(of_means, abs=5e-6)
    within = [(x - 5e-6, x + 5e-6) for x in means]
    rounded = [ratio_of_means(losses(*some)) for some in product(*within)]
    assert not min(rounded) - 5e-6 <= stored <= max(rounded) + 5e-6
    clean, spliced, zero = means
    found = []
    for t, g in product(np.linspace(-1, 1, 21), np.linspace(0, 1, 11)):
        tilt = np.array([1, -1.0])  # two batches
        batches = Losses(clean + 0 * tilt, spliced + t * tilt, zero + g * tilt)
        assert min(batches.clean_m.min(), batches.spliced_m.min(), batches.zero_m.min()) > 0
        assert ratio_of_means(batches) == pytest.approx(of_means, abs=5e-6)
        found.append(formula(batches))
    assert min(found) < stored < max(found)


def test_kissane_s_small_denominators() -> None:
    """A gap below 1e-4 counts as 1, so that its batch scores next to nothing."""
    tiny = Losses(np.array([1, 1.0]), np.array([1.5, 1.00002]), np.array([2, 1.00005]))
    assert kissane(tiny) == pytest.approx((0.5 + 0.00003) / 2, rel=1e-9)
    assert dictionary_learning(tiny) == pytest.approx((0.5 + 0.6) / 2, rel=1e-6)
