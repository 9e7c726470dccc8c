"""Linear heads for backbones that have none of their own: published ones, and probes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.heads import HeadInUse
from saebench.readouts import LinearHead

if TYPE_CHECKING:
    from saebench.backbones import Backbone
    from saebench.data import Dataset
    from saebench.fit import Fitter
    from saebench.units import Source


def linear_readout(
    backbone: Backbone, dataset: Dataset, source: Source, fitter: Fitter, used: HeadInUse
) -> LinearHead:
    """The linear head of a backbone for a dataset's classes. used: `published` or `probe`."""
    raise NotImplementedError
