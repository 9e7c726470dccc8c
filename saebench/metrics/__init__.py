"""Streaming metrics in float64: add batches, save and merge states, divide once at the end.

Nothing here imports another part of saebench; arrays come in and numbers go out.
"""

from saebench.metrics.bootstrap import REPLICATES, percentile_interval, poisson_weights
from saebench.metrics.sums import Contracted, ImageSums, Sums, Total, defined, per_kind, ratio

__all__ = [
    "REPLICATES",
    "Contracted",
    "ImageSums",
    "Sums",
    "Total",
    "defined",
    "per_kind",
    "percentile_interval",
    "poisson_weights",
    "ratio",
]
