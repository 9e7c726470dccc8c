"""Labelled image datasets: a manifest (ids, labels, label levels) and a way to decode one image.

    dataset = open_dataset(spec)             # spec: DatasetSpec, one TOML file
    manifest = dataset.manifest("test")      # ids, labels, levels, sha256, order(limit)
    image = dataset.image("test", 0)         # PIL image of the manifest's row 0

`saebench.data.loader.batches` turns rows into tensors; it is not imported here, so that opening a
dataset and hashing its manifest need no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from saebench.data.access import Access
from saebench.data.dataset import Dataset
from saebench.data.manifest import Manifest
from saebench.errors import NotFound
from saebench.specs import DatasetSpec

__all__ = ["Access", "Dataset", "Manifest", "open_dataset"]


def _digits(spec: DatasetSpec, access: Access) -> Dataset:
    from saebench.data.digits import Digits

    return Digits(spec)


def _shapes(spec: DatasetSpec, access: Access) -> Dataset:
    from saebench.data.shapes import Shapes

    return Shapes(spec)


def _images(spec: DatasetSpec, access: Access) -> Dataset:
    from saebench.data.images import Images

    return Images(spec, access)


def _idx(spec: DatasetSpec, access: Access) -> Dataset:
    from saebench.data.idx import Idx

    return Idx(spec, access)


def _dsprites(spec: DatasetSpec, access: Access) -> Dataset:
    from saebench.data.dsprites import DSprites

    return DSprites(spec, access)


SOURCES: dict[str, Callable[[DatasetSpec, Access], Dataset]] = {
    "digits": _digits,
    "shapes": _shapes,
    "images": _images,
    "idx": _idx,
    "dsprites": _dsprites,
}
"""`DatasetSpec.source` -> the reader that opens it."""


def open_dataset(spec: DatasetSpec, access: Access | None = None) -> Dataset:
    """The dataset an entry describes, as it is to be had on this machine.

    Errors: NotFound for an unknown source, SpecError for options it does not have.
    """
    if spec.source not in SOURCES:
        near = get_close_matches(spec.source, SOURCES, n=1)
        raise NotFound(
            f"{spec.path or spec.name}: no reader is called '{spec.source}'",
            f'did you mean source = "{near[0]}"?' if near else f"sources: {', '.join(SOURCES)}",
        )
    return SOURCES[spec.source](spec, access or Access())
