"""Turns the CoderRefs of a wave into coders: reads SAEs, and builds controls from train statistics.

A coder that cannot be made is not an exception of the wave but its own error, so that one bad file
fails its own units and the others finish.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from saebench.backbones import Backbone
from saebench.calibrate import Place, fit_train
from saebench.coders import CoderRef, chain_of, on_decoder, token_kinds
from saebench.errors import Mismatch
from saebench.fit import Fitter
from saebench.formats import read_entry
from saebench.meta import MetaSae
from saebench.registry import Registry
from saebench.saes import Coder, Sae
from saebench.specs import SaeSpec
from saebench.together import Member, Together
from saebench.units import root_site


@dataclass
class Loaded:
    """The coders of a wave that could be made, their places, and the errors of the others.

    So with a set that is spliced together: its place is the first of its members'.
    """

    coders: dict[CoderRef, Coder | Together] = field(default_factory=dict)
    places: dict[CoderRef, Place] = field(default_factory=dict)
    parents: dict[CoderRef, tuple[Coder, ...]] = field(default_factory=dict)  # backbone's first
    errors: dict[CoderRef, Exception] = field(default_factory=dict)
    shifts: dict[Place, np.ndarray] = field(default_factory=dict)  # [d] mean of train x
    means: dict[str, Tensor] = field(default_factory=dict)  # site -> [t d] of each token's kind

    def member(self, ref: CoderRef) -> Member | Together:
        """A coder at its place; or all of a set, each at its own."""
        coder = self.coders[ref]
        if isinstance(coder, Together):
            return coder
        return Member(ref, self.places[ref], coder, self.parents.get(ref, ()))


def load_coders(
    refs: Sequence[CoderRef], *, backbone: Backbone, registry: Registry, fitter: Fitter, seed: int
) -> Loaded:
    """Read and build the coders of a wave; fits the train statistics that they need."""
    single = list(dict.fromkeys(part for ref in refs for part in ref.parts))
    loaded = _load_single(single, backbone, registry, fitter, seed)
    for ref in refs:
        if ref.members:
            _put_together(ref, loaded, backbone)
    return loaded


def _put_together(ref: CoderRef, loaded: Loaded, backbone: Backbone) -> None:
    """Make a set of its members; it has the error of the first of them that could not be made."""
    error = next((loaded.errors[part] for part in ref.members if part in loaded.errors), None)
    if error is not None:
        loaded.errors[ref] = error
        return
    members = [member for part in ref.members if isinstance(member := loaded.member(part), Member)]
    together = Together.on(backbone, members)
    loaded.coders[ref], loaded.places[ref] = together, together.places[0]


def _load_single(
    refs: Sequence[CoderRef], backbone: Backbone, registry: Registry, fitter: Fitter, seed: int
) -> Loaded:
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
            *parents, coder = stacked(chain, saes)
        except Exception as error:
            loaded.errors[ref] = error
            continue
        loaded.parents[ref] = tuple(parents)
        if ref.control is None:
            loaded.coders[ref] = coder
    train = fit_train(
        [ref for ref in refs if ref not in loaded.errors],
        loaded.places,
        saes,
        registry=registry,
        fitter=fitter,
        seed=seed,
    )
    loaded.shifts = train.shifts
    loaded.means = {site: train.site_mean(site) for site in {p.site for p in train.shifts}}
    for ref in refs:
        if ref.control is not None and ref not in loaded.errors:
            loaded.coders[ref] = train.control(ref)
    return loaded


def stacked(chain: Sequence[SaeSpec], saes: Mapping[str, Sae]) -> list[Coder]:
    """The coders of a chain from the backbone up: each but the first reads the codes of the last.

    An SAE on the decoder of another takes its place: see `saebench.meta`.
    Errors: Mismatch for an SAE on the decoder of such an SAE.
    """
    coders: list[Coder] = []
    for link in reversed(chain):
        if not on_decoder(link):
            coders.append(saes[link.name])
            continue
        below = coders.pop()
        if not isinstance(below, Sae):
            raise Mismatch(
                f"the SAE '{link.name}' ({link.path}) reads the decoder of an SAE that reads a "
                "decoder itself",
                "one such step can be measured",
            )
        coders.append(MetaSae(below, saes[link.name]))
    return coders


def check_widths(chain: Sequence[SaeSpec], saes: Mapping[str, Sae], width: int, site: str) -> None:
    """Errors: Mismatch where an SAE's width is not that of what it reads."""
    wide = width
    for link in reversed(chain):
        sae = saes[link.name]
        if on_decoder(link):
            width, site = wide, link.site
        if sae.d_model != width:
            raise Mismatch(
                f"the SAE '{link.name}' ({link.path}) reads {sae.d_model} dimensions, "
                f"and the site '{site}' has {width}",
                "is it the right backbone, site or file?",
            )
        width, wide, site = sae.d_sae, sae.d_out, f"sae:{link.name}/codes"
