"""Text classifiers: class names put into templates, embedded, and averaged over the templates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.readouts import ZeroShot

if TYPE_CHECKING:
    from saebench.backbones import Backbone
    from saebench.data import Dataset
    from saebench.store import Store


def zero_shot_readouts(
    backbone: Backbone, dataset: Dataset, store: Store, names: str
) -> list[ZeroShot]:
    """Templates and bare names, each at the model's own temperature and at 1; the first of them
    (templates, model) is the default where there are templates."""
    raise NotImplementedError
