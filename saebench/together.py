"""Several SAEs spliced together: all are replaced in one forward pass, each at its own site.

    x_1  the untouched activations at the first site; x̂_1 goes on in their place
    x_2  what ARRIVES at the second site after that; x̂_2 = decode(encode(x_2)) goes on
    …    and so on to the output

so that every SAE meets the errors of those before it, and the output has the compound cost of all.
An ablation puts 0, or the train mean, in the place of the same tokens at all sites at once. A
policy (`saebench.splice`) holds at every site: `sae_tokens` are each member's own, `cls` is CLS
wherever a site has one. Which SAEs are a set is decided by `saebench.sets`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from torch import Tensor

from saebench.backbones import Backbone, Capture
from saebench.batch import CoderError, SaeBatch
from saebench.calibrate import Place
from saebench.coders import CoderRef
from saebench.errors import Mismatch, NonFiniteError, UsageError
from saebench.images import Images, rebased
from saebench.splice import Ablation, ablation, policy_kinds, with_parts

if TYPE_CHECKING:
    from saebench.backbones import Output
    from saebench.saes import Coder


@dataclass(frozen=True)
class Member:
    """One coder at its place. below: of the chain it sits on, the backbone's first."""

    ref: CoderRef
    place: Place
    coder: Coder
    below: tuple[Coder, ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """Where a splice replaces something."""
        return (self.place,)

    def refused(self, site: str, kinds: Sequence[str]) -> str:
        """It replaces whatever tokens it is asked to."""
        return ""

    def batch(self, images: Images, tile_bytes: int) -> SaeBatch:
        """What a task sees of some images."""
        view = images.view(self.place.site, self.place.kinds)
        for coder in self.below:
            view = view.above(coder, self.ref.site, tile_bytes)
        return SaeBatch(view, self.coder, tile_bytes)

    def replacements(
        self, images: Images, kinds: Sequence[str], tile_bytes: int, keep_error: bool
    ) -> dict[str, Tensor]:
        """Token kind -> its reconstruction. Errors: those of `SaeBatch`, with the member's name."""
        try:
            return self.batch(images, tile_bytes).replacements(kinds, keep_error=keep_error)
        except (CoderError, NonFiniteError, Mismatch) as error:
            raise type(error)(f"'{self.ref.name}': {error.what}", error.hint) from error


@dataclass(frozen=True, eq=False)
class Together:
    """The members of a set, and the sites where they are, both as a forward pass meets them.

    places: each site once, with the token kinds that any member covers there.
    """

    members: tuple[Member, ...]
    places: tuple[Place, ...]

    @classmethod
    def on(cls, backbone: Backbone, members: Sequence[Member]) -> Together:
        """The members on a backbone."""
        places = []
        for site in backbone.in_order(dict.fromkeys(member.place.site for member in members)):
            covered = {k for m in members if m.place.site == site for k in m.place.kinds}
            kinds = tuple(kind for kind in backbone.spec.sites[site].kinds if kind in covered)
            places.append(Place(site, kinds))
        order = [place.site for place in places]
        ordered = sorted(members, key=lambda member: order.index(member.place.site))
        return cls(tuple(ordered), tuple(places))

    def batch(self, images: Images, tile_bytes: int) -> TogetherBatch:
        """What a task sees of some images."""
        return TogetherBatch(images, self, tile_bytes)

    @property
    def architecture(self) -> str:
        return " + ".join(dict.fromkeys(member.coder.architecture for member in self.members))

    @property
    def d_model(self) -> int:
        """Width of what the first member reads."""
        return self.members[0].coder.d_model

    @property
    def d_sae(self) -> int:
        """Latents of all members."""
        return sum(member.coder.d_sae for member in self.members)

    def at(self, site: str) -> list[Member]:
        """The members that are at a site of the backbone."""
        return [member for member in self.members if member.place.site == site]

    def refused(self, site: str, kinds: Sequence[str]) -> str:
        """Why the members at a site cannot replace these tokens; '' where they can.

        One alone replaces what is asked for, also tokens that it was not trained on; of several,
        each its own.
        """
        members = self.at(site)
        covered = {kind for member in members for kind in member.place.kinds}
        left = [kind for kind in kinds if kind not in covered]
        if len(members) == 1 or not left:
            return ""
        names = ", ".join(f"'{member.ref.name}'" for member in members)
        return (
            f"none of {names} was trained on the tokens {', '.join(left)} of '{site}', and which "
            "of them should replace these is not said"
        )


@dataclass(frozen=True)
class TogetherBatch:
    """Some images and several SAEs (`saebench.task.Batch`, as far as a splicing task asks).

    images: with their captures at the first site at least.
    """

    images: Images
    coder: Together
    tile_bytes: int
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def ids(self) -> Sequence[str]:
        return self.images.ids

    @property
    def first(self) -> int:
        return self.images.first

    @property
    def n_images(self) -> int:
        return len(self.images.ids)

    @property
    def places(self) -> range:
        """Positions of the images in the evaluation order."""
        return range(self.first, self.first + self.n_images)

    @property
    def labels(self) -> np.ndarray:
        return self.images.labels

    @property
    def levels(self) -> Mapping[str, np.ndarray]:
        return self.images.levels

    @property
    def weights_br(self) -> Tensor:
        return self.images.weights_br

    @property
    def kinds(self) -> Mapping[str, slice]:
        """The tokens that are covered at the first site."""
        place = self.coder.places[0]
        return rebased(self.images.layout(place.site), place.kinds)

    @property
    def n_rows(self) -> int:
        """Covered tokens of these images at the first site."""
        return self.n_images * max(part.stop for part in self.kinds.values())

    @property
    def d_sae(self) -> int:
        return self.coder.d_sae

    def shared(self, key: str, compute: Callable[[], Any]) -> Any:
        """`compute()` once for this set."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def shared_by_all(self, key: str, compute: Callable[[], Any]) -> Any:
        """`compute()` once for all that see the same images."""
        return self.images.once(key, compute)

    @property
    def clean_name(self) -> str:
        full = self.images.backbone.last_block == "full"
        first, *later = (place.site for place in self.coder.places)
        return self.images.clean_from(first) if full or not later else f"{first}, {later}"

    @property
    def clean_output(self) -> Output:
        """Of the untouched images. Where the last block may be short, by the way of the splices."""
        first, *later = (place.site for place in self.coder.places)
        if self.images.backbone.last_block == "full" or not later:
            return self.images.clean_output(first)
        return self.shared("clean", lambda: self._replaced({}, lambda images, site, kinds: {}))

    def spliced_output(self, replaced: str = "sae_tokens", *, keep_error: bool = False) -> Output:
        """Output with every member's reconstruction in place of what arrives at its site.

        keep_error: at every site what a reconstruction misses is added back, which gives the clean
        output. Errors: UsageError (no site has such tokens); CoderError; NonFiniteError; Mismatch.
        """

        def parts(images: Images, site: str, kinds: Sequence[str]) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for member, own in self._owners(site, kinds):
                found |= member.replacements(images, own, self.tile_bytes, keep_error)
            return found

        key = f"spliced {replaced} {keep_error}"
        return self.shared(key, lambda: self._replaced(self._kinds_of(replaced), parts))

    def ablated_output(self, value: Ablation, ablated: str = "sae_tokens") -> Output:
        """Output with 0 or the train mean for the tokens of a policy, at all sites at once.

        Errors: UsageError (no site has such tokens).
        """

        def parts(images: Images, site: str, kinds: Sequence[str]) -> dict[str, Tensor]:
            return {kind: ablation(images, site, kind, value) for kind in kinds}

        kinds = self._kinds_of(ablated)
        return self.shared(f"{value} {kinds}", lambda: self._replaced(kinds, parts))

    def _replaced(
        self,
        kinds: Mapping[str, Sequence[str]],
        parts_of: Callable[[Images, str, Sequence[str]], Mapping[str, Tensor]],
    ) -> Output:
        """Output of one pass in which every site's tokens of some kinds are replaced."""

        def changed(acts_btd: Tensor, images: Images, site: str) -> Tensor:
            parts = parts_of(images, site, kinds.get(site, ()))
            return with_parts(acts_btd, images.layout(site), parts)

        def as_it_arrives(acts_btd: Tensor, site: str) -> Tensor:
            arrived = replace(self.images, captures={site: Capture(acts_btd)}, _memo={})
            return changed(acts_btd, arrived, site)

        first, *later = (place.site for place in self.coder.places)
        capture = self.images.captures[first]
        return self.images.backbone.resume(
            first,
            changed(capture.acts_btd, self.images, first),
            capture.state,
            {site: partial(as_it_arrives, site=site) for site in later},
        )

    def _kinds_of(self, policy: str) -> dict[str, tuple[str, ...]]:
        """Site -> the token kinds that a policy names there, which may be none."""
        found = {
            place.site: policy_kinds(policy, self.images.layout(place.site), place.kinds)
            for place in self.coder.places
        }
        if not any(found.values()):
            raise UsageError(
                f"'{policy}' names no tokens at any of the sites {', '.join(found)}",
                "use sae_tokens or all",
            )
        return found

    def _owners(self, site: str, kinds: Sequence[str]) -> list[tuple[Member, list[str]]]:
        """Of the members at a site, who replaces which of these token kinds.

        Errors: UsageError for tokens that none of several covers.
        """
        if why := self.coder.refused(site, kinds):
            raise UsageError(why, "splice sae_tokens, each its own, or one of these SAEs")
        members = self.coder.at(site)
        if len(members) == 1:
            return [(members[0], list(kinds))] if kinds else []
        own = {m.ref: [kind for kind in kinds if kind in m.place.kinds] for m in members}
        return [(member, own[member.ref]) for member in members if own[member.ref]]

    def _refuse(self) -> NoReturn:
        raise UsageError(
            "several SAEs spliced together have no activations or codes of one",
            "a task that splices looks at outputs; measure the others without --splice-together",
        )

    @property
    def x_btd(self) -> Tensor:
        """Errors: UsageError, always; and so for the next three."""
        self._refuse()

    @property
    def codes(self) -> Any:
        self._refuse()

    @property
    def recon_btd(self) -> Tensor:
        self._refuse()

    @property
    def decoder_norms_s(self) -> Tensor:
        self._refuse()
