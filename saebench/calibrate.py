"""Builds the controls of a wave from what was fitted on train rows (`saebench.fits`).

First, in one pass: the mean of every site in use, the covariance where a PCA asks for it, the
measured L0 of every SAE behind an `@random`. Then, in a second and short one, the scale of each
`@random` at that L0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from saebench import controls
from saebench.backbones import Backbone
from saebench.coders import CoderRef
from saebench.fit import Fit, Fitter
from saebench.fits import (
    RandomScale,
    SaeL0,
    SiteMean,
    SiteScatter,
    mean_per_token,
    overall_mean,
    principal_components,
)
from saebench.registry import Registry
from saebench.saes import Coder, Sae
from saebench.specs import SiteSpec
from saebench.store import Artifact
from saebench.units import coder_identity


@dataclass(frozen=True)
class Place:
    """Where coders sit: a site of the backbone and the token kinds they cover there."""

    site: str
    kinds: tuple[str, ...]


@dataclass
class TrainStatistics:
    """What train rows say about the sites and SAEs of a wave; makes its controls."""

    backbone: Backbone
    places: Mapping[CoderRef, Place]
    saes: Mapping[str, Sae]  # by registry name
    seed: int
    artifacts: Mapping[tuple[str, str], Artifact]  # (kind, site or coder) -> artifact
    shifts: dict[Place, np.ndarray]  # [d] float64 mean of train x over a place's tokens

    def control(self, ref: CoderRef) -> Coder:
        """The control that a reference names."""
        return {
            "identity": self._identity,
            "zero": self._zero,
            "mean": self._mean,
            "pca": self._pca,
            "random": self._random,
            "shuffled-decoder": self._shuffled_decoder,
        }[ref.control or ""](ref)

    def random(self, ref: CoderRef, scale: float) -> Sae:
        """An `@random` control at its SAE's measured L0, of a given scale."""
        return controls.random_like(
            self._sae(ref),
            l0=float(self.artifacts["sae_l0", ref.name].arrays["l0"]),
            scale=scale,
            mean_d=self.tensor(self.shifts[self.places[ref]]),
            generator=named_generator(ref.name, self.seed),
        )

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """float32 on the backbone's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.backbone.device, torch.float32)

    def site_mean(self, site: str) -> torch.Tensor:
        """[t d] float32: for each token of a site, the train mean of its kind."""
        layout = self.backbone.spec.sites[site].kinds
        sums = self.artifacts["site_mean", site].arrays
        return self.tensor(mean_per_token(sums, layout, tuple(layout)))

    def _identity(self, ref: CoderRef) -> Coder:
        return controls.Identity(self._site(ref).width)

    def _zero(self, ref: CoderRef) -> Coder:
        return controls.Zero(self._site(ref).width)

    def _mean(self, ref: CoderRef) -> Coder:
        place = self.places[ref]
        sums = self.artifacts["site_mean", place.site].arrays
        return controls.Mean(self.tensor(mean_per_token(sums, self._site(ref).kinds, place.kinds)))

    def _pca(self, ref: CoderRef) -> Coder:
        place = self.places[ref]
        mean_d, _, basis_dd = principal_components(
            self.artifacts["site_mean", place.site].arrays,
            self.artifacts["site_scatter", place.site].arrays,
            self._site(ref).kinds,
            place.kinds,
        )
        return controls.Pca(self.tensor(mean_d), self.tensor(basis_dd[:, : ref.k]))

    def _random(self, ref: CoderRef) -> Coder:
        return self.random(ref, float(self.artifacts["random_scale", ref.name].arrays["scale"]))

    def _shuffled_decoder(self, ref: CoderRef) -> Coder:
        return controls.shuffled_decoder(self._sae(ref), named_generator(ref.name, self.seed))

    def _site(self, ref: CoderRef) -> SiteSpec:
        return self.backbone.spec.sites[self.places[ref].site]

    def _sae(self, ref: CoderRef) -> Sae:
        assert ref.sae is not None
        return self.saes[ref.sae.name]


def fit_train(
    refs: Sequence[CoderRef],
    places: Mapping[CoderRef, Place],
    saes: Mapping[str, Sae],
    *,
    registry: Registry,
    fitter: Fitter,
    seed: int,
) -> TrainStatistics:
    """Fit what the controls among `refs` need, and the mean of every place."""
    backbone = fitter.backbone
    makers: dict[tuple[str, str], Callable[[], Fit]] = {}
    for ref in refs:
        site = places[ref].site
        makers["site_mean", site] = partial(SiteMean, backbone, site)
        if ref.control == "pca":
            makers["site_scatter", site] = partial(SiteScatter, backbone, site)
        if ref.control == "random":
            assert ref.sae is not None
            key = coder_identity(registry, ref)
            sae = saes[ref.sae.name]
            kinds = places[ref].kinds
            makers["sae_l0", ref.name] = partial(SaeL0, backbone, site, kinds, sae, key)
    artifacts = dict(zip(makers, fitter.fit(list(makers.values())), strict=True))
    shifts = {}
    for place in {places[ref]: None for ref in refs}:
        sums = artifacts["site_mean", place.site].arrays
        mean_d = overall_mean(sums, backbone.spec.sites[place.site].kinds, place.kinds)
        # Rounded, so that the last bits of a mean, which depend on the machine, move nothing.
        shifts[place] = mean_d.astype(np.float32).astype(np.float64)
    train = TrainStatistics(backbone, places, saes, seed, artifacts, shifts)

    random = [ref for ref in refs if ref.control == "random"]
    scales = fitter.fit([partial(_random_scale, train, registry, ref) for ref in random])
    named = {("random_scale", ref.name): scale for ref, scale in zip(random, scales, strict=True)}
    train.artifacts = {**artifacts, **named}
    return train


def _random_scale(train: TrainStatistics, registry: Registry, ref: CoderRef) -> RandomScale:
    place = train.places[ref]
    key = {
        "coder": coder_identity(registry, ref),
        "seed": train.seed,
        "mean": train.artifacts["site_mean", place.site].id,
        "l0": train.artifacts["sae_l0", ref.name].id,
    }
    bias_d = train.tensor(train.shifts[place])
    unscaled = train.random(ref, 1.0)
    return RandomScale(train.backbone, place.site, place.kinds, unscaled, bias_d, key)


def named_generator(name: str, seed: int) -> torch.Generator:
    """A CPU generator that depends on the name and the seed only, not on what else runs."""
    digest = hashlib.blake2b(f"{name}\0{seed}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
