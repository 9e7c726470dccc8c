"""Which tokens of an image a probe reads, by the value of a task's option `feature`.

    cls        the CLS token
    mean       the image's own tokens, patches or grid; without them and CLS, the registers
    cls+mean   both, one after the other
    pooled     a site that is one vector already
    embedding  the backbone's final embedding; of codes what `auto` means
    auto       cls where it is covered, else pooled, else mean

of the tokens that a coder covers. Without torch, since this is known before a run; what is made of
the tokens is in `saebench.probing.features`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from saebench.coders import CoderRef, token_kinds
from saebench.errors import UsageError
from saebench.specs import SiteSpec

FEATURES = ("auto", "cls", "mean", "cls+mean", "pooled", "embedding")
SPATIAL = ("patches", "grid")

Pooling = Literal["max", "mean", "none"]  # none: there is one token


@dataclass(frozen=True)
class Feature:
    """A feature of one coder's tokens. parts: of `name`, each a slice of the t covered tokens.

    code_parts: the same for codes.
    """

    name: str
    parts: tuple[slice, ...]
    code_parts: tuple[slice, ...]

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """In how many ways codes become one vector; the first is the default."""
        several = any(part.stop - part.start > 1 for part in self.code_parts)
        return ("max", "mean") if several else ("none",)


def feature_of(chosen: str, kinds: Mapping[str, slice], who: str) -> Feature:
    """The feature that an option's value names, among the tokens that a coder covers.

    kinds: token kind -> its slice of them. Errors: UsageError for tokens that it does not cover.
    """
    usual = _usual(kinds)
    name = usual if chosen == "auto" else chosen
    codes = _parts(usual if name == "embedding" else name, kinds, who)
    return Feature(name, () if name == "embedding" else codes, codes)


def said_once(chosen: str, kinds: Mapping[str, slice], who: str) -> str:
    """The same feature as `auto` where that reads the same tokens. Errors: as of `feature_of`."""
    same = feature_of(chosen, kinds, who).parts == feature_of("auto", kinds, who).parts
    return "auto" if same else chosen


def covered(site: SiteSpec, ref: CoderRef) -> dict[str, slice]:
    """Token kind -> its slice of the tokens that a coder covers, at the backbone's own site."""
    found: dict[str, slice] = {}
    start = 0
    for kind in token_kinds(site, ref.tokens, who=ref.label):
        count = site.kinds[kind].stop - site.kinds[kind].start
        found[kind] = slice(start, start + count)
        start += count
    return found


def _usual(kinds: Mapping[str, slice]) -> str:
    return "cls" if "cls" in kinds else "pooled" if "pooled" in kinds else "mean"


def _parts(name: str, kinds: Mapping[str, slice], who: str) -> tuple[slice, ...]:
    spatial = [kinds[kind] for kind in SPATIAL if kind in kinds]
    found: list[slice] = []
    for part in name.split("+"):
        if part == "mean" and not spatial and name == "mean" and "cls" not in kinds:
            spatial = [slice(0, max(p.stop for p in kinds.values()))]  # registers alone
        tokens = spatial if part == "mean" else [kinds[part]] if part in kinds else []
        if not tokens:
            what = "patches or grid" if part == "mean" else part
            raise UsageError(
                f"the feature '{name}' reads {what}, and {who} covers {', '.join(kinds)}",
                f"choose another of: {', '.join(FEATURES)}",
            )
        found += tokens
    return tuple(found)
