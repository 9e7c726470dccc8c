"""The evaluation split as a run sees it: its images in their order, batch by batch.

Images are cut at fixed boundaries into segments of 2,048 (`units.SEGMENT`), and segments into
batches. Where images that do not decode are left out, their places stay empty: all that comes after
keeps its place, whichever segment was measured first. In the same way it shows train images to
those who fit on what SAEs make of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import torch

from saebench.activation_keys import Part
from saebench.activation_store import ActivationStore
from saebench.backbones import Backbone, Capture
from saebench.bad_images import consecutive
from saebench.data import Dataset
from saebench.data.loader import Batch, parts
from saebench.images import Images
from saebench.store import Store
from saebench.units import SEGMENT, Source


class Notes(Protocol):
    """Who is told which images were left out (`saebench.bad_images.BadImages`)."""

    def add(self, split: str, row: int, why: str) -> None: ...


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
        bad: Notes,
        tokens: Store | None = None,
        split: str | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        """tokens: where activations are kept, and looked for before images are decoded.

        split, rows: in place of the evaluation split's first n images these rows of the manifest
        of another, in this order, or all of it. Their activations are not kept.
        """
        if tokens is not None and (split is not None or rows is not None):
            raise ValueError("activations are kept of the evaluation split alone")
        self.backbone, self.dataset, self.source = backbone, dataset, source
        self.workers, self.bad = workers, bad
        self.bad_images: Literal["fail", "skip"] = bad_images
        self.split = source.spec.test if split is None else split
        manifest = dataset.manifest(self.split)
        n = source.n_images if split is None else None
        self.order = manifest.order(n) if rows is None else rows
        self.ids = [manifest.ids[row] for row in self.order]
        self.labels = manifest.labels[self.order]
        self.levels = {name: values[self.order] for name, values in manifest.levels.items()}
        self.means: dict[str, torch.Tensor] = {}  # site -> [t d], for mean ablation
        self._place = np.full(len(manifest), -1)  # row of the manifest -> place in the order
        self._place[self.order] = np.arange(len(self.order))
        self._why: dict[int, str] = {}  # place -> why its image was left out
        self.kept: ActivationStore | None = None
        if tokens is not None:
            ids = [manifest.ids[row] for row in manifest.order()]
            self.kept = ActivationStore(tokens, backbone, source, ids)
        self._ahead: Iterator[Iterator[Batch]] = iter(())
        self._next: tuple[int, int] | None = None  # segment and batch size that `_ahead` gives next

    def places(self, segment: int) -> range:
        """The places of a segment's images in the evaluation order."""
        return range(segment * SEGMENT, min((segment + 1) * SEGMENT, len(self.order)))

    def batches(self, segment: int, sites: Sequence[str], batch_size: int) -> Iterator[Images]:
        """The images of a segment, with their activations at some sites.

        From the store where that has them all; else the images are decoded and run through.
        Errors: DataError for an image that does not decode, unless such are left out.
        """
        if self.kept is None:
            for first, captures in self._run(segment, sites, batch_size):
                yield self._images(first, captures)
            return
        part, start = self._part(segment, batch_size), self.places(segment).start
        if found := self.kept.find(part, sites, left_out=self.bad_images == "skip"):
            for place, why in found.left_out.items():
                self._leave_out(int(self.order[start + place]), why)
            for place, captures in found.pieces():
                yield self._images(start + place, captures)
            return
        with self.kept.keeping(part, sites, self._why) as keeping:
            for first, captures in self._run(segment, sites, batch_size):
                keeping.append(first - start, captures)
                yield self._images(first, captures)

    def _images(self, first: int, captures: Mapping[str, Capture]) -> Images:
        stop = first + len(next(iter(captures.values())).acts_btd)
        return Images(
            self.backbone,
            self.source.spec.name,
            self.ids[first:stop],
            self.labels[first:stop],
            {name: values[first:stop] for name, values in self.levels.items()},
            first,
            captures,
            self.means,
        )

    def _run(
        self, segment: int, sites: Sequence[str], batch_size: int
    ) -> Iterator[tuple[int, Mapping[str, Capture]]]:
        """Place of the first, and activations, of successive images that decode."""
        for rows, images_b3hw in self._decoded(segment, sites, batch_size):
            for part in consecutive(self._place[rows]):
                on_device = images_b3hw[part].to(self.backbone.device, non_blocking=True)
                yield int(self._place[rows[part.start]]), self.backbone.acts(on_device, sites)

    def _part(self, segment: int, batch_size: int) -> Part:
        places = self.places(segment)
        whole = min(SEGMENT, len(self._place) - places.start)
        return Part(segment, places.start, len(places), whole, batch_size)

    def _leave_out(self, row: int, why: str) -> None:
        self._why[int(self._place[row])] = why
        self.bad.add(self.split, row, why)

    def _decoded(self, segment: int, sites: Sequence[str], batch_size: int) -> Iterator[Batch]:
        """A segment's batches. Workers go on to the next one, which is mostly asked for then."""
        if self._next != (segment, batch_size):
            left = [self.places(one) for one in self._to_decode(segment, sites, batch_size)]
            self._ahead = parts(
                self.dataset,
                self.split,
                [self.order[places.start : places.stop] for places in left],
                self.backbone.transform,
                batch_size,
                self.workers,
                bad_images=self.bad_images,
                on_bad=self._leave_out,
            )
        self._next = None  # a segment that is broken off is begun anew
        yield from next(self._ahead)
        self._next = (segment + 1, batch_size)

    def _to_decode(self, segment: int, sites: Sequence[str], batch_size: int) -> Iterator[int]:
        """A segment, and those behind it up to the first that lies in the store."""
        yield segment
        skip = self.bad_images == "skip"
        for later in range(segment + 1, -(-len(self.order) // SEGMENT)):
            if self.kept and self.kept.has(self._part(later, batch_size), sites, left_out=skip):
                return
            yield later
