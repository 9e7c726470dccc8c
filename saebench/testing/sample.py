"""A few real images of a backbone as a run has them: batches, train means, heads, a context."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from saebench.backbones import Backbone, Reads, load_backbone
from saebench.batch import SaeBatch
from saebench.calibrate import Place
from saebench.coders import CoderRef
from saebench.data import Access, Dataset
from saebench.fit import Fitter
from saebench.fits import SiteMean, mean_per_token
from saebench.images import Images, rebased
from saebench.loading import Loaded
from saebench.options import values_of
from saebench.probing.collect import Collector
from saebench.probing.prober import Probing
from saebench.probing.probes import Probes
from saebench.readouts import Readouts, build_readouts
from saebench.registry import Registry
from saebench.saes import TILE_BYTES, Coder
from saebench.splice import policy_kinds
from saebench.store import Store
from saebench.task import Context, Task
from saebench.testing.report import N_IMAGES, real_images
from saebench.tiles import Tiles
from saebench.units import Source, Unit

TRAIN_IMAGES = 64  # that a mean is taken over


@dataclass(frozen=True)
class Sample:
    """The first evaluation images of a backbone's dataset, seen at its default site."""

    backbone: Backbone
    dataset: Dataset
    order: np.ndarray
    images_b3hw: torch.Tensor
    store: Store

    @classmethod
    def of(cls, registry: Registry, name: str, access: Access | None, store: Path) -> Sample:
        """Errors: those of loading a backbone and of opening its dataset."""
        backbone = load_backbone(registry.buildable(name))
        dataset, order, images_b3hw = real_images(backbone, registry, access=access)
        return cls(backbone, dataset, order, images_b3hw, Store(store))

    @property
    def site(self) -> str:
        return self.backbone.spec.site

    @property
    def layout(self) -> dict[str, slice]:
        """Token kind -> its slice of the site's tokens."""
        return dict(self.backbone.spec.sites[self.site].kinds)

    @cached_property
    def fitter(self) -> Fitter:
        spec = self.dataset.spec
        test, train = (self.dataset.manifest(split) for split in (spec.test, spec.train))
        n_train = min(TRAIN_IMAGES, len(train))
        source = Source(spec, test.sha256, train.sha256, N_IMAGES, n_train, n_train, n_train)
        return Fitter(
            self.backbone,
            self.dataset,
            source,
            self.store,
            lambda *sites: {"sites": sites},  # the store is this sample's own
            "float32",
            Tiles(TILE_BYTES, N_IMAGES),
        )

    @cached_property
    def mean_td(self) -> torch.Tensor:
        """[t d] float32: for each token of the site the train mean of its kind."""
        (fitted,) = self.fitter.fit([lambda: SiteMean(self.backbone, self.site)])
        mean_td = mean_per_token(fitted.arrays, self.layout, tuple(self.layout))
        return torch.from_numpy(mean_td).to(self.backbone.device, torch.float32)

    def readouts(self, task: type[Task]) -> Readouts:
        """The heads that a task reads at its default options."""
        options = values_of(task, {})
        choices = {name: options[name] for name in ("head", "names") if name in options}
        return build_readouts(
            self.backbone, self.dataset, self.fitter.source, self.fitter, **choices
        )

    def probes(self, task: type[Task], coder: Coder) -> Probes | None:
        """The probes that a task reads at its default options, on few train images.

        Errors: those of collecting and fitting them.
        """
        ref = CoderRef("identity", self.site, "all", control="identity")
        identity = {"backbone": {"name": self.backbone.spec.name}, "sae": {"name": ref.name}}
        identity |= {"seed": 0, "dataset": {}}  # the store is this sample's own
        source, options = self.fitter.source, values_of(task, {})
        unit = Unit(self.backbone.spec, ref, task, source, identity, options=options)
        place = Place(self.site, tuple(self.layout))
        tiles = Tiles(TILE_BYTES, N_IMAGES)
        collector = Collector(self.backbone, self.dataset, source, self.store, "float32", tiles)
        probing = Probing(collector, seed=0)
        probing.prepare([unit], Loaded(coders={ref: coder}, places={ref: place}))
        if error := probing.error(unit):
            raise error
        return probing.of(unit)

    def context(self, task: type[Task], coder: Coder) -> Context:
        """What a task may know of a coder that covers all tokens of the site."""
        readouts = self.readouts(task) if "readouts" in task.needs else None

        def sees(policy: str, reads: Reads = "any") -> bool | None:
            kinds = policy_kinds(policy, self.layout, tuple(self.layout))
            return self.backbone.sees(self.site, kinds, reads) if kinds else None

        return Context(
            backbone=self.backbone.spec.name,
            sae="identity",
            dataset=self.dataset.spec.name,
            site=self.site,
            tokens="all",
            d_model=coder.d_model,
            d_sae=coder.d_sae,
            kinds=rebased(self.layout, tuple(self.layout)),
            n_images=len(self.order),
            class_names=self.dataset.class_names,
            labels=self.dataset.label_names,
            options=values_of(task, {}),
            readouts=readouts.heads if readouts else (),
            captions=readouts.captions if readouts else None,
            probes=self.probes(task, coder) if "probes" in task.needs else None,
            sees=sees,
            shift_d=np.zeros(coder.d_model),
        )

    def batch(self, coder: Coder, first: int, stop: int) -> SaeBatch:
        """The images at places first … stop - 1, and a coder that covers all their tokens."""
        manifest = self.dataset.manifest(self.dataset.spec.test)
        index = self.order[first:stop]
        images = Images(
            self.backbone,
            self.dataset.spec.name,
            [manifest.ids[i] for i in index],
            manifest.labels[index],
            {level: values[index] for level, values in manifest.levels.items()},
            first,
            self.backbone.acts(self.images_b3hw[first:stop], [self.site]),
            {self.site: self.mean_td},
        )
        return SaeBatch(images.view(self.site, tuple(self.layout)), coder, TILE_BYTES)
