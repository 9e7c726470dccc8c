"""The Poisson bootstrap: its weights against exact arithmetic, its intervals by simulation."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from math import factorial

import numpy as np
import pytest
from scipy import stats

from saebench.metrics.bootstrap import _CDF, percentile_interval, poisson_weights

IDS = [f"image-{i}" for i in range(2000)]

# weights of the images "a" and "b" of "digits" in the first twelve replicates
GOLDEN = [
    [1, 1, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    [1, 0, 1, 1, 1, 0, 2, 0, 1, 1, 2, 1],
]


def splitmix64(key: int, steps: int) -> int:
    """Output number `steps` of SplitMix64 seeded with `key`, in Python's own integers."""
    mask = 2**64 - 1
    z = (key + steps * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_table_is_the_distribution_function() -> None:
    one_over_e = sum(Fraction((-1) ** k, factorial(k)) for k in range(60))
    cdf = [one_over_e * sum(Fraction(1, factorial(j)) for j in range(k + 1)) for k in range(20)]
    assert [int(p * 2**64) for p in cdf] == _CDF.tolist()


def test_weights_are_the_inverse_of_it() -> None:
    weights_br = poisson_weights("digits", IDS[:5], 500)
    table = [int(value) for value in _CDF]
    for i in range(5):
        digest = hashlib.blake2b(f"digits\0{IDS[i]}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        expected = [sum(splitmix64(key, r + 1) >= edge for edge in table) for r in range(500)]
        assert weights_br[i].tolist() == expected


def test_weights_never_change() -> None:
    """Stored replicates of old runs pair with those of new ones only if this holds for ever."""
    assert poisson_weights("digits", ["a", "b"], 12).astype(int).tolist() == GOLDEN


def test_weights_are_poisson_and_independent() -> None:
    weights_br = poisson_weights("digits", IDS)
    n = weights_br.size
    assert weights_br.mean() == pytest.approx(1, abs=4 / np.sqrt(n))
    assert weights_br.var() == pytest.approx(1, abs=4 * np.sqrt(3 / n))
    observed = np.bincount(np.minimum(weights_br.astype(int).ravel(), 6), minlength=7)
    expected = [*stats.poisson(1).pmf(range(6)), stats.poisson(1).sf(5)]
    assert stats.chisquare(observed, np.array(expected) * n).pvalue > 1e-3
    centred = weights_br - 1
    # Correlations between replicates, and between images, are those of independent draws.
    between_replicates = (centred.T @ centred / len(IDS))[np.triu_indices(500, 1)]
    assert np.abs(between_replicates).max() < 6 / np.sqrt(len(IDS))
    assert between_replicates.std() == pytest.approx(1 / np.sqrt(len(IDS)), rel=0.02)
    between_images = (centred[:400] @ centred[:400].T / 500)[np.triu_indices(400, 1)]
    assert between_images.std() == pytest.approx(1 / np.sqrt(500), rel=0.02)


def test_weights_belong_to_the_image_alone() -> None:
    whole = poisson_weights("digits", IDS)
    parts = np.concatenate([poisson_weights("digits", IDS[:7]), poisson_weights("digits", IDS[7:])])
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(poisson_weights("digits", IDS[::-1]), whole[::-1])
    assert not np.array_equal(poisson_weights("shapes", IDS), whole)


def test_percentile_interval() -> None:
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))
    few = np.full(500, np.nan)
    few[:400] = 1
    assert percentile_interval(few) == (None, None)
    few[:490] = 1
    assert percentile_interval(few) == (1, 1)


def simulated(generator: np.random.Generator, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors and squared deviations per image, of four tokens that depend on each other.

    Tokens share their image's size a ~ Γ(4)/4: ‖r‖² ~ 0.3·a·χ²₃/3 and ‖x − μ‖² ~ a·χ²₃/3, so the
    true ratio is 0.3.
    """
    size = generator.gamma(4, 1 / 4, (images, 1))
    errors = 0.3 * size * generator.chisquare(3, (images, 4)) / 3
    total = size * generator.chisquare(3, (images, 4)) / 3
    return errors.sum(1), total.sum(1)


def test_the_interval_covers_at_its_nominal_rate() -> None:
    generator = np.random.default_rng(0)
    trials, images = 600, 300
    covered = 0
    for trial in range(trials):
        weights_br = poisson_weights(f"trial {trial}", IDS[:images])
        errors_b, total_b = simulated(generator, images)
        low, high = percentile_interval((weights_br.T @ errors_b) / (weights_br.T @ total_b))
        assert low is not None
        assert high is not None
        covered += low <= 0.3 <= high
    # Four standard deviations of a binomial rate, and half a point for the bootstrap itself.
    tolerance = 4 * np.sqrt(0.95 * 0.05 / trials) + 0.005
    assert covered / trials == pytest.approx(0.95, abs=tolerance)


def test_resampling_tokens_instead_of_images_would_not_cover() -> None:
    """The simulation can tell: intervals that take tokens as independent are too narrow."""
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        errors_b, _ = simulated(generator, 100)
        tokens = np.repeat(errors_b / 4, 4)  # an image's tokens, wholly dependent
        weights_br = poisson_weights(f"trial {trial}", IDS[:400])
        low, high = percentile_interval((weights_br.T @ tokens) / weights_br.sum(0))
        assert low is not None
        assert high is not None
        covered += low <= 0.3 <= high
    assert covered / 200 < 0.8


def test_pairing_narrows_a_difference() -> None:
    generator = np.random.default_rng(2)
    errors_b, total_b = simulated(generator, 300)
    weights_br = poisson_weights("digits", IDS[:300])
    one = (weights_br.T @ errors_b) / (weights_br.T @ total_b)
    other = (weights_br.T @ (1.1 * errors_b)) / (weights_br.T @ total_b)
    low, high = percentile_interval(other - one)
    assert low is not None
    assert high is not None
    assert high - low < 0.25 * (np.quantile(one, 0.975) - np.quantile(one, 0.025))
