"""Random numbers as a pure function of integers, the same for ever and on every platform.

h(key, counter) is the output function of SplitMix64 (Steele, Lea and Flood, 2014) applied to
h(key) + counter * golden, in wrapping 64-bit integers. NumPy's generators are not used because
their streams may change between versions (NEP 19).
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mix(key: np.ndarray | np.uint64, counter: np.ndarray) -> np.ndarray:
    """uint64 array, the hash of (key, counter); the two broadcast. Chain it for more integers.

    `counter` is an array of at least one dimension: NumPy's scalars warn where arrays wrap.
    """
    z = key + (counter.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLIERS[0]
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLIERS[1]
    return z ^ (z >> np.uint64(31))


def uniform(bits: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1), a multiple of 2^-53."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(bits: np.ndarray) -> np.ndarray:
    """uint64 -> float64 of mean 0 and variance 1: the four 16-bit parts added (Irwin-Hall).

    Integer sums, so that no platform's `log` or `cos` comes into it. Bounded by 3.47.
    """
    parts = sum((bits >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
    centred = np.asarray(parts).astype(np.float64) - 2 * 65535
    return centred / np.sqrt((65536.0**2 - 1) / 3)
