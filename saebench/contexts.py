"""What a task may know before the first batch, put together from a run."""

from __future__ import annotations

import numpy as np

from saebench.backbones import Backbone, Reads
from saebench.calibrate import Place
from saebench.data import Dataset
from saebench.images import rebased
from saebench.loading import Loaded
from saebench.probing.probes import Probes
from saebench.readouts import Readouts
from saebench.splice import policy_kinds
from saebench.task import Context
from saebench.units import Unit


def context_of(
    unit: Unit,
    loaded: Loaded,
    backbone: Backbone,
    dataset: Dataset,
    readouts: Readouts | None,
    probes: Probes | None,
    *,
    seed: int,
) -> Context:
    """The context of a unit. readouts, probes: where its task needs them."""
    place, coder = loaded.places[unit.coder], loaded.coders[unit.coder]
    member, layout = loaded.member(unit.coder), backbone.spec.sites[place.site].kinds
    on_backbone = not (unit.coder.members or loaded.parents.get(unit.coder))

    def named(policy: str) -> list[tuple[Place, tuple[str, ...]]]:
        """Each place with the tokens that a policy names there, where it names some."""
        layouts = [(place, backbone.spec.sites[place.site].kinds) for place in member.places]
        found = [(place, policy_kinds(policy, kinds, place.kinds)) for place, kinds in layouts]
        return [(place, kinds) for place, kinds in found if kinds]

    def sees(policy: str, reads: Reads = "any") -> bool | None:
        # Of several SAEs spliced together it suffices that the output sees the tokens of one.
        found = named(policy)
        if not found:
            return None
        return any(backbone.sees(place.site, kinds, reads) for place, kinds in found)

    def foreign(policy: str) -> list[str]:
        several = len(member.places) > 1
        return [
            f"{kind} of {place.site}" if several else kind
            for place, kinds in named(policy)
            for kind in kinds
            if kind not in place.kinds
        ]

    def refused(policy: str) -> str:
        whys = (member.refused(place.site, kinds) for place, kinds in named(policy))
        return next(filter(None, whys), "")

    return Context(
        backbone=unit.backbone.name,
        sae=unit.coder.name,
        dataset=unit.source.spec.name,
        site=unit.coder.site,
        tokens=unit.coder.tokens,
        d_model=coder.d_model,
        d_sae=coder.d_sae,
        kinds=rebased(layout, place.kinds),
        n_images=unit.source.n_images,
        last_block=backbone.last_block,
        class_names=dataset.class_names,
        labels=dataset.label_names,
        options=unit.options,
        readouts=readouts.heads if readouts else (),
        captions=readouts.captions if readouts else None,
        probes=probes,
        sees=sees,
        foreign=foreign,
        refused=refused,
        conventions=unit.conventions,
        seed=seed,
        shift_d=loaded.shifts[place] if on_backbone else np.zeros(coder.d_model),
    )
