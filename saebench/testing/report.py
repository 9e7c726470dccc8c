"""What a check sees, and the real images it looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from saebench.backbones import Backbone
from saebench.data import Access, Dataset, open_dataset
from saebench.data.loader import batches
from saebench.errors import DataError, SaebenchError
from saebench.registry import Registry

N_IMAGES = 32  # real images that a check looks at
EMBEDDED = "shapes"  # the dataset that is always there


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what was seen."""

    name: str
    passed: bool
    detail: str


def attempt(name: str, look: Callable[[], str]) -> Check:
    """A check that passes when `look` returns what it saw, and fails with what it raised."""
    try:
        return Check(name, True, look())
    except AssertionError as error:
        return Check(name, False, str(error))
    except Exception as error:
        said = (
            str(error) if isinstance(error, SaebenchError) else f"{type(error).__name__}: {error}"
        )
        return Check(name, False, said)


def real_images(
    backbone: Backbone, registry: Registry, n: int = N_IMAGES, access: Access | None = None
) -> tuple[Any, ...]:
    """(dataset, evaluation positions, images_b3hw) of the first n images of its own dataset.

    Where that is not on this machine, of the embedded `shapes`, enlarged: a check downloads none.
    """
    spec = registry.dataset(backbone.spec.dataset or EMBEDDED)
    try:
        here = replace(
            access or Access.of(None), first={spec.test: n, spec.train: n}, download=False
        )
        dataset = open_dataset(spec, here)
        order = dataset.manifest(spec.test).order(n)
    except DataError:
        spec = registry.dataset(EMBEDDED)
        dataset = open_dataset(spec)
        order = dataset.manifest(spec.test).order(n)
    stream = batches(dataset, spec.test, order, backbone.transform, n)
    _, images_b3hw = next(iter(stream))
    return dataset, order, images_b3hw


def of_which(dataset: Dataset, backbone: Backbone) -> str:
    """Which images a check looked at, and why not the backbone's own."""
    own = backbone.spec.dataset
    if own in ("", dataset.spec.name):
        return dataset.spec.name
    return f"{dataset.spec.name}: {own} is not here (give --data-root)"
