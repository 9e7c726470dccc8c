"""What a task may know before the first batch, put together from a run."""

from __future__ import annotations

import numpy as np

from saebench.backbones import Backbone
from saebench.data import Dataset
from saebench.images import rebased
from saebench.loading import Loaded
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
    *,
    seed: int,
) -> Context:
    """The context of a unit. readouts: where its task needs them."""
    place, coder = loaded.places[unit.coder], loaded.coders[unit.coder]
    layout = backbone.spec.sites[place.site].kinds
    on_backbone = not (unit.coder.members or loaded.parents.get(unit.coder))
    places = loaded.member(unit.coder).places

    def sees(policy: str) -> bool | None:
        # Of several SAEs spliced together it suffices that the output sees the tokens of one.
        found = [
            (place.site, policy_kinds(policy, backbone.spec.sites[place.site].kinds, place.kinds))
            for place in places
        ]
        named = [(site, kinds) for site, kinds in found if kinds]
        return any(backbone.sees(*place) for place in named) if named else None

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
        site_kinds=tuple(layout),
        last_block=backbone.last_block,
        class_names=dataset.class_names,
        labels=dataset.label_names,
        options=unit.options,
        readouts=readouts.heads if readouts else (),
        captions=readouts.captions if readouts else None,
        sees=sees,
        conventions=unit.conventions,
        seed=seed,
        shift_d=loaded.shifts[place] if on_backbone else np.zeros(coder.d_model),
    )
