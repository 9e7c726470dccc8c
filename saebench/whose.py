"""Columns of a row that say which SAE it is of, or which SAEs spliced together.

Of a set every column is made of those of its members, in model order: names, sites and tokens are
joined by ` + `; what all share stands once, and else is joined too, or is empty where the column
may be. `d_model` is of the first, `d_sae` the latents of all, `depth` the greatest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saebench.coders import CoderRef
from saebench.meta import MetaSae
from saebench.record import Record
from saebench.registry import Registry
from saebench.saes import Coder, Sae
from saebench.sets import JOINED
from saebench.specs import BackboneSpec
from saebench.together import Together
from saebench.weights import weights_revision

ONCE = ("sae_architecture", "sae_recipe", "origin")  # joined where members differ
SHARED = ("sae_seed", "sae_revision", "sae_sha256", "sae_format")  # empty where they differ


def coder_columns(
    ref: CoderRef,
    coder: Coder | Together,
    identity: Mapping[str, Any],
    backbone: BackboneSpec,
    registry: Registry,
) -> dict[str, Any]:
    """The columns of an SAE, a control or a set. identity: `units.coder_identity`."""
    if not isinstance(coder, Together):
        return _columns(ref, coder, identity, backbone, registry)
    coders = {member.ref: member.coder for member in coder.members}
    return joined(
        [
            _columns(part, coders[part], one, backbone, registry)
            for part, one in zip(ref.members, identity["together"], strict=True)
        ]
    )


def joined(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of a set, from those of its members."""
    estimated = (member["sae_estimated"] for member in members)
    facts = {fact for text in estimated if text for fact in text.split(",")}
    columns: dict[str, Any] = {
        name: JOINED.join(member[name] for member in members) for name in ("sae", "site", "tokens")
    }
    for name in ONCE:
        columns[name] = JOINED.join(dict.fromkeys(member[name] for member in members))
    for name in SHARED:
        values = {member[name] for member in members}
        columns[name] = values.pop() if len(values) == 1 else None
    return columns | {
        "sae_estimated": ",".join(sorted(facts)) or None,
        "d_model": members[0]["d_model"],
        "d_sae": sum(member["d_sae"] for member in members),
        "depth": max(member["depth"] for member in members),
    }


def _columns(
    ref: CoderRef,
    coder: Coder,
    identity: Mapping[str, Any],
    backbone: BackboneSpec,
    registry: Registry,
) -> dict[str, Any]:
    spec = ref.sae
    record = coder.record if isinstance(coder, (Sae, MetaSae)) and ref.is_sae else Record()
    origin = registry.saes.origin(spec.name) if spec else registry.backbones.origin(backbone.name)
    return {
        "sae": ref.name,
        "sae_architecture": coder.architecture,
        "sae_recipe": spec.recipe if spec and ref.is_sae else "control",
        "sae_seed": spec.seed if spec and ref.is_sae else None,
        "sae_revision": (weights_revision(spec) or None) if spec else None,
        "sae_sha256": identity["saes"][0]["weights"] if spec else None,
        "sae_format": record.format or None,
        "sae_estimated": ",".join(record.estimated) or None,
        "origin": origin.label,
        "site": ref.site,
        "tokens": ref.tokens,
        "d_model": coder.d_model,
        "d_sae": coder.d_sae,
        "depth": ref.depth,
    }
