"""Turns the CoderRefs of a wave into coders: reads SAEs, and builds controls from train statistics.

A coder that cannot be made is not an exception of the wave but its own error, so that one bad file
fails its own units and the others finish.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from saebench import controls
from saebench.backbones import Backbone
from saebench.coders import CoderRef, chain_of, token_kinds
from saebench.errors import Mismatch
from saebench.fit import (
    Fit,
    Fitter,
    RandomScale,
    SaeL0,
    SiteMean,
    SiteScatter,
    mean_per_token,
    overall_mean,
    principal_components,
)
from saebench.formats import read_entry
from saebench.plan import coder_identity, root_site
from saebench.registry import Registry
from saebench.saes import Coder, Sae
from saebench.specs import SaeSpec


@dataclass(frozen=True)
class Place:
    """Where coders sit: a site of the backbone and the token kinds they cover there."""

    site: str
    kinds: tuple[str, ...]


@dataclass
class Loaded:
    """The coders of a wave that could be made, their places, and the errors of the others."""

    coders: dict[CoderRef, Coder] = field(default_factory=dict)
    places: dict[CoderRef, Place] = field(default_factory=dict)
    parents: dict[CoderRef, tuple[Sae, ...]] = field(default_factory=dict)  # outermost first
    errors: dict[CoderRef, Exception] = field(default_factory=dict)
    shifts: dict[Place, np.ndarray] = field(default_factory=dict)  # [d] mean of train x


def load_coders(
    refs: Sequence[CoderRef], *, backbone: Backbone, registry: Registry, fitter: Fitter, seed: int
) -> Loaded:
    """Read and build the coders of a wave; fits the train statistics that they need."""
    loaded = Loaded()
    saes: dict[str, Sae] = {}
    for ref in refs:
        site = root_site(registry, ref)
        layout = backbone.spec.sites[site]
        kinds = token_kinds(layout, ref.tokens, who=ref.name)
        loaded.places[ref] = Place(site, kinds)
        if ref.sae is None:
            continue
        try:
            chain = chain_of(registry, ref.sae)
            for link in reversed(chain):
                if link.name not in saes:
                    saes[link.name] = read_entry(link).to(backbone.device)
            check_widths(chain, saes, layout.width, site)
        except Exception as error:
            loaded.errors[ref] = error
            continue
        loaded.parents[ref] = tuple(saes[link.name] for link in reversed(chain[1:]))
        if ref.control is None:
            loaded.coders[ref] = saes[ref.sae.name]
    _build_controls(loaded, refs, saes, backbone, registry, fitter, seed)
    return loaded


def check_widths(chain: Sequence[SaeSpec], saes: Mapping[str, Sae], width: int, site: str) -> None:
    """Errors: Mismatch where an SAE's width is not that of what it reads."""
    for link in reversed(chain):
        sae = saes[link.name]
        if sae.d_model != width:
            raise Mismatch(
                f"the SAE '{link.name}' ({link.path}) reads {sae.d_model} dimensions, "
                f"and the site '{site}' has {width}",
                "is it the right backbone, site or file?",
            )
        width, site = sae.d_sae, f"sae:{link.name}/codes"


def _build_controls(
    loaded: Loaded,
    refs: Sequence[CoderRef],
    saes: Mapping[str, Sae],
    backbone: Backbone,
    registry: Registry,
    fitter: Fitter,
    seed: int,
) -> None:
    good = [ref for ref in refs if ref not in loaded.errors]
    places = {loaded.places[ref]: None for ref in good}
    fits: dict[tuple[str, str], Fit] = {}
    for place in places:
        fits["mean", place.site] = SiteMean(backbone, place.site)
    for ref in good:
        place = loaded.places[ref]
        if ref.control == "pca":
            fits["scatter", place.site] = SiteScatter(backbone, place.site)
        if ref.control == "random":
            assert ref.sae is not None
            fits["l0", ref.name] = SaeL0(
                backbone, place.site, place.kinds, saes[ref.sae.name], coder_identity(registry, ref)
            )
    found = dict(zip(fits, fitter.fit(list(fits.values())), strict=True))
    for place in places:
        layout = backbone.spec.sites[place.site].kinds
        # Rounded, so that the last bits of a mean, which depend on the machine, move nothing.
        shift_d = overall_mean(found["mean", place.site], layout, place.kinds)
        loaded.shifts[place] = shift_d.astype(np.float32).astype(np.float64)

    for ref in good:
        place = loaded.places[ref]
        layout = backbone.spec.sites[place.site].kinds
        d_model = backbone.spec.sites[place.site].width
        mean = found["mean", place.site]
        if ref.control == "identity":
            loaded.coders[ref] = controls.Identity(d_model)
        elif ref.control == "zero":
            loaded.coders[ref] = controls.Zero(d_model)
        elif ref.control == "mean":
            mean_td = mean_per_token(mean, layout, place.kinds)
            loaded.coders[ref] = controls.Mean(_tensor(mean_td, backbone))
        elif ref.control == "pca":
            assert ref.k is not None
            scatter = found["scatter", place.site]
            mean_d, _, basis_dd = principal_components(mean, scatter, layout, place.kinds)
            basis_dk = _tensor(basis_dd[:, : ref.k], backbone)
            loaded.coders[ref] = controls.Pca(_tensor(mean_d, backbone), basis_dk)
        elif ref.control == "shuffled-decoder":
            assert ref.sae is not None
            generator = named_generator(ref.name, seed)
            loaded.coders[ref] = controls.shuffled_decoder(saes[ref.sae.name], generator)
    _build_random(loaded, good, saes, backbone, registry, fitter, seed, found)


def _build_random(
    loaded: Loaded,
    refs: Sequence[CoderRef],
    saes: Mapping[str, Sae],
    backbone: Backbone,
    registry: Registry,
    fitter: Fitter,
    seed: int,
    found: Mapping[tuple[str, str], Mapping[str, np.ndarray]],
) -> None:
    """`@random`: first unscaled, at the SAE's measured L0; then with the scale that fits train."""

    def control(ref: CoderRef, scale: float) -> Sae:
        assert ref.sae is not None
        return controls.random_like(
            saes[ref.sae.name],
            l0=float(found["l0", ref.name]["l0"]),
            scale=scale,
            mean_d=_tensor(loaded.shifts[loaded.places[ref]], backbone),
            generator=named_generator(ref.name, seed),
        )

    random = [ref for ref in refs if ref.control == "random"]
    fits = []
    for ref in random:
        place = loaded.places[ref]
        bias_d = _tensor(loaded.shifts[place], backbone)
        key = {"coder": coder_identity(registry, ref), "seed": seed}
        fits.append(RandomScale(backbone, place.site, place.kinds, control(ref, 1.0), bias_d, key))
    for ref, arrays in zip(random, fitter.fit(fits), strict=True):
        loaded.coders[ref] = control(ref, float(arrays["scale"]))


def _tensor(array: np.ndarray, backbone: Backbone) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(backbone.device, torch.float32)


def named_generator(name: str, seed: int) -> torch.Generator:
    """A CPU generator that depends on the name and the seed only, not on what else runs."""
    digest = hashlib.blake2b(f"{name}\0{seed}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
