"""The evaluation split as a run sees it: its images in their order, batch by batch.

Images are cut at fixed boundaries into segments of 2,048 (`units.SEGMENT`), and segments into
batches. Where images that do not decode are left out, their places stay empty: all that comes after
keeps its place, whichever segment was measured first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from saebench.backbones import Backbone
from saebench.bad_images import BadImages
from saebench.data import Dataset
from saebench.data.loader import Batch, parts
from saebench.images import Images
from saebench.store import Store
from saebench.units import SEGMENT, Source


class Evaluation:
    """The first n images of the evaluation order, with their ids, labels and label levels."""

    def __init__(
        self,
        backbone: Backbone,
        dataset: Dataset,
        source: Source,
        *,
        workers: int,
        bad_images: Literal["fail", "skip"],
        bad: BadImages,
        tokens: Store | None = None,
    ) -> None:
        self.backbone, self.dataset, self.source = backbone, dataset, source
        self.workers, self.bad = workers, bad
        self.tokens = tokens  # where activations are kept and looked for
        self.bad_images: Literal["fail", "skip"] = bad_images
        manifest = dataset.manifest(source.spec.test)
        self.order = manifest.order(source.n_images)
        self.ids = [manifest.ids[row] for row in self.order]
        self.labels = manifest.labels[self.order]
        self.levels = {name: values[self.order] for name, values in manifest.levels.items()}
        self.means: dict[str, torch.Tensor] = {}  # site -> [t d], for mean ablation
        self._place = np.full(len(manifest), -1)  # row of the manifest -> place in the order
        self._place[self.order] = np.arange(len(self.order))
        self._ahead: Iterator[Iterator[Batch]] = iter(())
        self._next: tuple[int, int] | None = None  # segment and batch size that `_ahead` gives next

    def places(self, segment: int) -> range:
        """The places of a segment's images in the evaluation order."""
        return range(segment * SEGMENT, min((segment + 1) * SEGMENT, self.source.n_images))

    def batches(self, segment: int, sites: Sequence[str], batch_size: int) -> Iterator[Images]:
        """The images of a segment, with their activations at some sites.

        Errors: DataError for an image that does not decode, unless such are left out.
        """
        for rows, images_b3hw in self._decoded(segment, batch_size):
            for part in consecutive(self._place[rows]):
                first = int(self._place[rows[part.start]])
                stop = first + part.stop - part.start
                on_device = images_b3hw[part].to(self.backbone.device, non_blocking=True)
                yield Images(
                    self.backbone,
                    self.source.spec.name,
                    self.ids[first:stop],
                    self.labels[first:stop],
                    {name: values[first:stop] for name, values in self.levels.items()},
                    first,
                    self.backbone.acts(on_device, sites),
                    self.means,
                )

    def _decoded(self, segment: int, batch_size: int) -> Iterator[Batch]:
        """A segment's batches. Workers go on to the next one, which is mostly asked for then."""
        if self._next != (segment, batch_size):
            split = self.source.spec.test
            left = [self.places(later) for later in range(segment, self.source.n_segments)]
            self._ahead = parts(
                self.dataset,
                split,
                [self.order[places.start : places.stop] for places in left],
                self.backbone.transform,
                batch_size,
                self.workers,
                bad_images=self.bad_images,
                on_bad=lambda row, why: self.bad.add(split, row, why),
            )
        self._next = None  # a segment that is broken off is begun anew
        yield from next(self._ahead)
        self._next = (segment + 1, batch_size)


def consecutive(places: np.ndarray) -> Iterator[slice]:
    """Slices of an ascending array in which each value is one more than the last."""
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    edges = [0, *breaks.tolist(), len(places)]
    for start, stop in pairwise(edges):
        yield slice(start, stop)
