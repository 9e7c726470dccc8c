"""What must be known before the evaluation pass, fitted on the train split only.

A fit looks at the activations of a site (`saebench.fits`, `saebench.trainfacts`), or at the
backbone's output and the images' labels (`saebench.linear_head`), of the first images of the train
split in its fixed order. What comes of it is an artifact of the store, keyed by everything that can
change it, and shared by all runs. What is asked for together is fitted in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from saebench.backbones import Backbone
from saebench.data import Dataset
from saebench.data.loader import batches
from saebench.data.manifest import Manifest
from saebench.errors import DataError, NonFiniteError, is_out_of_memory
from saebench.identity import content_hash
from saebench.images import check_finite
from saebench.specs import semantic_fields
from saebench.store import Artifact, Store
from saebench.tiles import Tiles
from saebench.units import PROTOCOL, Source


class SiteFit(Protocol):
    """One artifact being fitted: sees train activations, then gives arrays."""

    site: str

    @property
    def kind(self) -> str: ...
    @property
    def n_images(self) -> int | None: ...  # first train images; None: all that statistics see
    @property
    def key(self) -> Mapping[str, Any]: ...
    def update(self, acts_btd: torch.Tensor, tile_bytes: int) -> None: ...
    def arrays(self) -> dict[str, np.ndarray]: ...


class OutputFit(Protocol):
    """The same, of the backbone's output: sees what a linear head reads, and main labels."""

    site: None

    @property
    def kind(self) -> str: ...
    @property
    def n_images(self) -> int | None: ...  # first train images; None: all that heads see
    @property
    def key(self) -> Mapping[str, Any]: ...
    def update(self, read_bd: torch.Tensor, labels_b: np.ndarray) -> None: ...
    def arrays(self) -> dict[str, np.ndarray]: ...


Fit = SiteFit | OutputFit


@dataclass(frozen=True)
class Fitter:
    """Fits artifacts of one backbone on one dataset's train split, each once for everybody."""

    backbone: Backbone
    dataset: Dataset
    source: Source
    store: Store
    identity: Callable[..., Mapping[str, Any]]  # of the backbone, at a site where one is given
    dtype: str
    tiles: Tiles
    workers: int = 0
    bad_images: Literal["fail", "skip"] = "fail"
    on_images: Callable[[int], None] = lambda n: None
    on_bad: Callable[[str, int, str], None] = lambda split, row, why: None
    ahead: Sequence[Callable[[], Fit]] = ()  # will be asked for later: fitted in a pass that is due

    def fit(self, makers: Sequence[Callable[[], Fit]]) -> list[Artifact]:
        """The artifact of each, from the store where it is, else from one pass for all.

        Each maker gives an empty fit; a pass that runs out of memory begins again with new ones.
        A fit of which images were left out is another artifact, and made anew in every run: only a
        pass tells which images still do not decode.
        Errors: NonFiniteError (NaN or infinite train activations: nothing is stored), DataError
        (an image that does not decode, or none that does).
        """
        if self.ahead and not all(self._find(make()) for make in makers):
            # What fails of those is not of those asked for now: they are tried by themselves then,
            # and it is told when it is asked for.
            try:
                return self._fit([*makers, *self.ahead])[: len(makers)]
            except (DataError, NonFiniteError):
                raise  # of the images or the backbone: it would come again
            except Exception:
                pass
        return self._fit(makers)

    def _find(self, fit: Fit) -> Artifact | None:
        return self.store.find(fit.kind, self._key(fit))

    def _fit(self, makers: Sequence[Callable[[], Fit]]) -> list[Artifact]:
        found = [self._find(make()) for make in makers]
        missing = [i for i, artifact in enumerate(found) if artifact is None]
        fitted, bad = self._pass([makers[i] for i in missing])
        made = dict(zip(missing, fitted, strict=True))
        artifacts = []
        for i, artifact in enumerate(found):
            if artifact is None:
                fit = made[i]
                key = self._key(fit) | self._left_out(fit, bad)
                artifact = self.store.get(fit.kind, key, fit.arrays)
            artifacts.append(artifact)
        return artifacts

    def _key(self, fit: Fit) -> dict[str, Any]:
        return {
            "backbone": self.identity(*([fit.site] if fit.site is not None else [])),
            "dataset": {"name": self.source.spec.name, **semantic_fields(self.source.spec)},
            "train": self.source.train_sha256,
            "n_images": self._n_images(fit),
            "dtype": self.dtype,
            "protocol": PROTOCOL,
            **fit.key,
        }

    def _n_images(self, fit: Fit) -> int:
        most = self.source.n_probe if fit.site is None else self.source.n_train
        return min(fit.n_images or most, most)

    def _left_out(self, fit: Fit, bad: Mapping[int, str]) -> dict[str, Any]:
        """What the key of a fit says of its images that were left out: bad is place -> id."""
        ids = [bad[place] for place in sorted(bad) if place < self._n_images(fit)]
        if len(ids) == self._n_images(fit):
            raise DataError(
                f"none of the {len(ids)} images of '{self.source.spec.name}', split "
                f"'{self.source.spec.train}', that {fit.kind} is fitted on can be decoded",
                "the first of them, and why, are in the list of bad images",
            )
        return {"left_out": content_hash(ids)} if ids else {}

    def _pass(self, makers: Sequence[Callable[[], Fit]]) -> tuple[list[Fit], dict[int, str]]:
        """The fits after their pass, and the images that were left out: place -> id."""
        while True:
            fits = [make() for make in makers]
            try:
                return fits, self._see_images(fits) if fits else {}
            except Exception as error:
                if not (is_out_of_memory(error) and self.tiles.halve()):
                    raise
                error.__traceback__ = None  # it holds the frames that hold the memory
                del fits

    def _see_images(self, fits: Sequence[Fit]) -> dict[int, str]:
        last = max(self._n_images(fit) for fit in fits)
        split = self.source.spec.train
        manifest = self.dataset.manifest(split)
        order = manifest.order(last)
        place = {row: i for i, row in enumerate(order.tolist())}
        bad: dict[int, str] = {}

        def left_out(row: int, why: str) -> None:
            bad[place[row]] = manifest.ids[row]
            self.on_bad(split, row, why)

        stream = batches(
            self.dataset,
            split,
            order,
            self.backbone.transform,
            self.tiles.batch_size,
            self.workers,
            bad_images=self.bad_images,
            on_bad=left_out,
        )
        for index, images_b3hw in stream:
            # Each fit sees its own first images exactly, whatever else is fitted in the pass.
            places = np.array([place[row] for row in index.tolist()])
            own = {id(fit): int((places < self._n_images(fit)).sum()) for fit in fits}
            seeing = [fit for fit in fits if own[id(fit)]]
            self._show(seeing, own, images_b3hw, manifest, index)
            self.on_images(len(index))
        return bad

    def _show(
        self,
        fits: Sequence[Fit],
        own: Mapping[int, int],
        images_b3hw: torch.Tensor,
        manifest: Manifest,
        index: np.ndarray,
    ) -> None:
        """Show a batch to each fit, as many of its images as are the fit's own: the first ones."""
        first = manifest.ids[int(index[0])]
        of_sites = [fit for fit in fits if fit.site is not None]
        of_output = [fit for fit in fits if fit.site is None]
        sites = sorted({fit.site for fit in of_sites})
        captures = self.backbone.acts(images_b3hw, sites)
        for site in sites:
            acts_btd = captures[site].acts_btd.float()
            check_finite(acts_btd, self.backbone, site, first)
            for fit in of_sites:
                if fit.site == site:
                    fit.update(acts_btd[: own[id(fit)]], self.tiles.tile_bytes)
        if not of_output:
            return
        if captures:
            site = self.backbone.deepest(captures)
            output = self.backbone.resume(site, captures[site].acts_btd, captures[site].state)
        else:
            output = self.backbone.forward(images_b3hw)
        read_bd = output.read_bd.float()
        check_finite(read_bd, self.backbone, "its output", first)
        for fit in of_output:
            n = own[id(fit)]
            fit.update(read_bd[:n], manifest.labels[index[:n]])
