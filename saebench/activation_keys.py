"""What identifies the activations that `saebench run --store tokens` keeps.

Of each segment three kinds of tables, so that nothing lies in the store twice:

    boundary  the tensor x [n …] at a boundary of the model, in the model's own shape: what a
              bottleneck site reads, and what the block of a branch is given
    branch    the activations x [n t d] of a branch site
    state     what else resuming at a site needs: of most sites nothing

Their identity is everything that can change a bit of them on one machine: the backbone, where in
the model, the dataset, the ids of the images in their order, the batch size (a matrix product
rounds by its shape), dtype and kind of device, and whether images were left out. Labels change no
activation; versions of packages are not in it, as they are in no unit's identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from saebench.backbones import Backbone
from saebench.backbones.steps import Place, place_of
from saebench.identity import content_hash
from saebench.specs import semantic_fields
from saebench.units import Source, backbone_identity

PROTOCOL = 1  # of what the tables hold; that of their files is in `saebench.entries`

Key = tuple[str, int | str]  # ("boundary", its index), ("branch", site) or ("state", site)


@dataclass(frozen=True)
class Part:
    """The first n of the `whole` images of a segment, in batches of one size.

    start: the place of its first image in the evaluation order.
    """

    segment: int
    start: int
    n: int
    whole: int
    batch: int


class Keys:
    """Sites -> tables, and what identifies each. ids: all image ids in evaluation order."""

    def __init__(self, backbone: Backbone, source: Source, ids: Sequence[str]) -> None:
        self.backbone, self.source, self.ids = backbone, source, ids
        self._hashes: dict[tuple[int, int], str] = {}
        self._places: dict[str, Place] = {}
        self._boundaries: dict[int, list[list[str]]] = {}
        for where, i in backbone.model.boundaries().items():
            self._boundaries.setdefault(i, []).append(list(where))

    def place(self, site: str) -> Place:
        """Where a site lies in the model."""
        if site not in self._places:
            spec = self.backbone.spec.sites[site]
            place = place_of(self.backbone.model, spec.path, spec.side, self.who(site))
            self._places[site] = place
        return self._places[site]

    def who(self, site: str) -> str:
        return f"{self.backbone.spec.name}, site '{site}'"

    def key_of(self, site: str) -> Key:
        """Where the activations of a site lie."""
        place = self.place(site)
        return ("boundary", place.step) if place.module is None else ("branch", site)

    def fields(self, key: Key, part: Part, left_out: bool) -> dict[str, Any]:
        """What identifies a table."""
        kind, where = key
        at: dict[str, Any] = {"kind": kind}
        if isinstance(where, int):
            at |= {"step": where, "is": sorted(self._boundaries.get(where, []))}
        else:
            at["site"] = semantic_fields(self.backbone.spec.sites[where])
        spec = self.source.spec
        return {
            "backbone": self._backbone,
            "at": at,
            "dataset": {"name": spec.name, **semantic_fields(spec)},
            "segment": part.segment,
            "images": {"n": part.n, "ids": self._ids(part)},
            "batch": part.batch,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "device": self.backbone.device.type,
            "left_out": left_out,
            "protocol": PROTOCOL,
        }

    @cached_property
    def _backbone(self) -> dict[str, Any]:
        spec = self.backbone.spec
        identity = backbone_identity(spec, spec.site)
        # What a linear head reads may lie before a site, and is then part of its state.
        return {k: v for k, v in identity.items() if k != "site"} | {
            "features": list(spec.head.features)
        }

    def _ids(self, part: Part) -> str:
        if (part.start, part.n) not in self._hashes:
            ids = list(self.ids[part.start : part.start + part.n])
            self._hashes[part.start, part.n] = content_hash(ids)
        return self._hashes[part.start, part.n]

    def of(self, sites: Sequence[str]) -> list[Key]:
        """All tables of these sites."""
        keys: dict[Key, None] = {}
        for site in sites:
            key = self.key_of(site)
            keys |= {key: None, ("state", site): None}
            if key[0] == "branch":
                keys["boundary", self.place(site).step] = None
        return list(keys)

    def candidates(self, part: Part) -> list[Part]:
        """Where a part may lie: by itself, or in its whole segment if it ends between batches."""
        whole = replace(part, n=part.whole)
        return [part, whole] if part.n < part.whole and part.n % part.batch == 0 else [part]
