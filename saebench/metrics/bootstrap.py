"""The bootstrap over images, in one stream: 500 replicates, each image with a Poisson(1) weight.

The weight of an image in a replicate is a pure function of (dataset, image id, replicate): a hash
read through the inverse of the Poisson distribution. So memory is flat, parts of a data set can be
measured anywhere and merged, and two runs share their replicates: the difference of two measured
values, replicate by replicate, is a paired bootstrap (Hanley and MacGibbon 2006; Chamandy et al.
2012). Images are resampled whole, since the tokens of one image depend on each other.

    key(image)  = BLAKE2b-64 of "dataset\\0id"
    bits(image, r) = SplitMix64 output (Steele, Lea and Flood 2014) of key + (r + 1)·golden
    weight      = #{k : bits ≥ ⌊2^64 · P(Poisson(1) ≤ k)⌋}
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

REPLICATES = 500

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CDF = np.array(  # ⌊2^64 · P(Poisson(1) ≤ k)⌋, k = 0 … 19; beyond, less than 2^-64 is left
    [
        *(0x5E2D58D8B3BCDF1A, 0xBC5AB1B16779BE35, 0xEB715E1DC1582DC2, 0xFB23979734A252F1),
        *(0xFF1025F59174DC3D, 0xFFD90F3BA4055E19, 0xFFFA8B71FC72C913, 0xFFFF540C0914B3C9),
        *(0xFFFFED1F4AA8F120, 0xFFFFFE216E641462, 0xFFFFFFD4D85D3183, 0xFFFFFFFC6DA262B4),
        *(0xFFFFFFFFBA12D178, 0xFFFFFFFFFB07C64C, 0xFFFFFFFFFFAB8EA5, 0xFFFFFFFFFFFABE22),
        *(0xFFFFFFFFFFFFB11A, 0xFFFFFFFFFFFFFBA1, 0xFFFFFFFFFFFFFFC5, 0xFFFFFFFFFFFFFFFD),
    ],
    dtype=np.uint64,
)


def poisson_weights(dataset: str, ids: Sequence[str], replicates: int = REPLICATES) -> np.ndarray:
    """[b R] float64, whole numbers: how often each replicate holds each image."""
    return weights_of(image_keys(dataset, ids), replicates)


def image_keys(dataset: str, ids: Sequence[str]) -> np.ndarray:
    """[b] uint64: all that the weights of an image depend on, so that they can be made later."""
    return np.array([_key(dataset, image) for image in ids], dtype=np.uint64)


def weights_of(keys_b: np.ndarray, replicates: int = REPLICATES) -> np.ndarray:
    """[b R] float64: the weights of the images of these keys."""
    steps_r = np.arange(1, replicates + 1, dtype=np.uint64) * _GOLDEN
    bits_br = _mixed(keys_b[:, None] + steps_r)
    return np.searchsorted(_CDF, bits_br, side="right").astype(np.float64)


def percentile_interval(
    replicates_r: np.ndarray, level: float = 0.95
) -> tuple[float | None, float | None]:
    """The percentile interval of a statistic from its replicates.

    (None, None) where over 5 % of them are undefined, as with a handful of images.
    """
    finite = replicates_r[np.isfinite(replicates_r)]
    if finite.size < 0.95 * replicates_r.size or not finite.size:
        return None, None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _key(dataset: str, image: str) -> int:
    digest = hashlib.blake2b(f"{dataset}\0{image}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mixed(z: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64, wrapping."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
