"""Which SAEs and controls a run measures on a backbone: names and globs to `CoderRef`s.

A control is a known answer beside every SAE, on the same site and tokens:
  identity                x itself                                        (fvu 0)
  zero, mean              nothing, and the train mean of each token kind  (what ablations put there)
  pca-<k>                 k principal components of the train split       (one for each L0 in use)
  <sae>@random            seeded unit-row weights, TopK at that SAE's measured L0
  <sae>@shuffled-decoder  its codes, with the decoder's rows permuted
By default the last two are made from one SAE for each site and token set, the one of median L0;
`--sae '*@random'` or `--suite full` makes them from every one. SAEs of the full suite (the many of
a published sweep) run when they are named, or with `--suite full`; so do controls at their places.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from saebench.errors import Mismatch, SaebenchError
from saebench.registry import Registry, is_glob, not_found
from saebench.specs import KINDS, BackboneSpec, SaeSpec, SiteSpec

Control = Literal["identity", "zero", "mean", "pca", "random", "shuffled-decoder"]
DERIVED: tuple[Control, ...] = ("random", "shuffled-decoder")


@dataclass(frozen=True)
class CoderRef:
    """One thing to measure at one site and token set: an SAE's entry, or a control.

    Or a set of them that are spliced together, each at its own site: then `name`, `site` and
    `tokens` are those of its members, joined.
    """

    name: str
    site: str
    tokens: str
    sae: SaeSpec | None = None  # the entry, or the entry a control is derived from
    control: Control | None = None
    k: int | None = None
    depth: int = 1  # 2 for an SAE on an SAE
    members: tuple[CoderRef, ...] = ()  # of several spliced together (`saebench.sets`)

    @property
    def is_sae(self) -> bool:
        return self.control is None and not self.members

    @property
    def parts(self) -> tuple[CoderRef, ...]:
        """The members of a set, else itself."""
        return self.members or (self,)

    @property
    def label(self) -> str:
        """Its name, in a line that is to be read: of a large set the first and the last."""
        if len(self.members) <= 3:
            return self.name
        first, last = self.members[0].name, self.members[-1].name
        return f"{first} + … + {last} ({len(self.members)} together)"


def parent_of(site: str) -> str | None:
    """`sae:NAME/codes`, `sae:NAME/decoder` -> NAME; None for a site of the backbone itself."""
    if not site.startswith("sae:"):
        return None
    name, _, part = site.removeprefix("sae:").rpartition("/")
    if part not in ("codes", "decoder") or not name:
        raise Mismatch(
            f"the site '{site}' is not one that can be measured",
            'an SAE on an SAE is written  site = "sae:<entry>/codes"  or  "sae:<entry>/decoder"',
        )
    return name


def on_decoder(spec: SaeSpec) -> bool:
    """Whether an SAE reads the decoder directions of another."""
    return spec.site.startswith("sae:") and spec.site.endswith("/decoder")


def chain_of(registry: Registry, spec: SaeSpec) -> tuple[SaeSpec, ...]:
    """The SAE itself, its parent, …, down to the one that sits on the backbone."""
    chain = [spec]
    while parent := parent_of(chain[-1].site):
        if parent in (link.name for link in chain):
            raise Mismatch(f"the SAE '{spec.name}' sits on itself: {spec.path}")
        chain.append(registry.sae(parent))
    return tuple(chain)


def check_fit(backbone: BackboneSpec, ref: SaeSpec) -> SiteSpec:
    """The site of an SAE on a backbone. Errors: Mismatch naming both entries and what is there."""
    if ref.site not in backbone.sites:
        raise Mismatch(
            f"the SAE '{ref.name}' ({ref.path}) was trained on the site '{ref.site}', "
            f"which '{backbone.name}' does not declare",
            f"its sites: {', '.join(backbone.sites) or 'none'}",
        )
    site = backbone.sites[ref.site]
    token_kinds(site, ref.tokens, who=f"the SAE '{ref.name}' ({ref.path})")
    return site


def token_kinds(site: SiteSpec, tokens: str, *, who: str) -> tuple[str, ...]:
    """The kinds that a token policy covers at a site. Errors: Mismatch where one is absent."""
    if tokens == "all":
        return tuple(site.kinds)
    kinds = tuple(tokens.split("+"))
    for kind in kinds:
        if kind not in KINDS or kind not in site.kinds:
            raise Mismatch(
                f"{who} covers the tokens '{tokens}', and the site '{site.path}' has no '{kind}'",
                f"there: {', '.join(site.kinds)}; or all",
            )
    return tuple(kind for kind in site.kinds if kind in kinds)


@dataclass(frozen=True)
class Refusal:
    """What a glob or a default meant, and what cannot be measured: the others go on."""

    name: str
    error: SaebenchError


@dataclass(frozen=True)
class Candidates:
    """What can be measured on a backbone, and which SAEs cannot, with the reason."""

    refs: tuple[CoderRef, ...]
    refused: tuple[Refusal, ...] = ()


def candidates(registry: Registry, backbone: BackboneSpec) -> Candidates:
    """All SAEs and controls of a backbone; a derived control stands behind its SAE."""
    found, refused = _saes_of(registry, backbone)
    places: dict[tuple[str, str], list[CoderRef]] = {}
    refs: list[CoderRef] = []
    for ref in found:
        refs.append(ref)
        if ref.depth == 1:
            places.setdefault((ref.site, ref.tokens), []).append(ref)
            refs += [
                CoderRef(f"{ref.name}@{kind}", ref.site, ref.tokens, ref.sae, control=kind)
                for kind in DERIVED
            ]
    if backbone.site and not any(_by_default(ref) for ref in found):
        places.setdefault((backbone.site, "all"), [])
    for (site, tokens), members in places.items():
        plain: tuple[Control, ...] = ("identity", "zero", "mean")
        refs += [CoderRef(name, site, tokens, control=name) for name in plain]
        width = backbone.sites[site].width
        ranks = sorted({round(m.sae.l0) for m in members if m.sae and m.sae.l0})
        refs += [_pca(k, site, tokens) for k in ranks if 0 < k < width]
    return Candidates(tuple(refs), tuple(refused))


def _saes_of(registry: Registry, backbone: BackboneSpec) -> tuple[list[CoderRef], list[Refusal]]:
    """Every SAE made for a backbone, by name, and those below its name that are unusable."""
    refs, refused = [], []
    for name in registry.saes:
        try:
            spec = registry.sae(name)
            if spec.backbone == backbone.name:
                refs.append(_sae_ref(registry, backbone, spec))
        except SaebenchError as error:
            # An entry that cannot be read does not say whose it is, but its name mostly does.
            readable = name in registry.saes.read
            if readable or name.startswith(f"{backbone.name}/"):
                refused.append(Refusal(name, error))
    return refs, refused


def _sae_ref(registry: Registry, backbone: BackboneSpec, spec: SaeSpec) -> CoderRef:
    chain = chain_of(registry, spec)
    check_fit(backbone, chain[-1])
    return CoderRef(spec.name, spec.site, chain[-1].tokens, spec, depth=len(chain))


def _pca(k: int, site: str, tokens: str) -> CoderRef:
    return CoderRef(f"pca-{k}", site, tokens, control="pca", k=k)


def _by_default(ref: CoderRef) -> bool:
    """Whether it is an SAE of the default suite, on the backbone itself: its place has controls."""
    return ref.is_sae and ref.depth == 1 and ref.sae is not None and ref.sae.suite == "default"


def default_choice(refs: Sequence[CoderRef], suite: str, site: str) -> list[CoderRef]:
    """What runs when no SAE is named: see the module's first lines.

    A place that only SAEs of the full suite have is left to that suite, with its controls. `site`:
    of the backbone, where controls are run if no SAE is of the default suite.
    """
    if suite == "full":
        return list(refs)
    reference: dict[tuple[str, str], str] = {}
    by_place: dict[tuple[str, str], list[CoderRef]] = {}
    for ref in refs:
        if _by_default(ref):
            by_place.setdefault((ref.site, ref.tokens), []).append(ref)
    places = set(by_place) or {(site, "all")}
    for place, members in by_place.items():
        l0 = {member.name: round(member.sae.l0 or 0) if member.sae else 0 for member in members}
        median = sorted(l0.values())[len(l0) // 2]
        # Of several at the median, the one of shortest name is mostly the plain recipe.
        tied = [name for name in l0 if l0[name] == median]
        reference[place] = min(tied, key=lambda name: (len(name), name))
    return [
        ref
        for ref in refs
        if (ref.is_sae and ref.sae is not None and ref.sae.suite == "default")
        or (
            ref.control is not None
            and ref.control not in DERIVED
            and (ref.site, ref.tokens) in places
        )
        or (
            ref.sae is not None
            and ref.control in DERIVED
            and ref.sae.name == reference.get((ref.site, ref.tokens))
        )
    ]


@dataclass(frozen=True)
class Choice:
    """Backbone name -> what to measure on it, and what was meant but cannot be."""

    refs: dict[str, list[CoderRef]]
    refused: tuple[Refusal, ...]


def choose(
    registry: Registry, backbones: Sequence[BackboneSpec], patterns: Iterable[str], suite: str
) -> Choice:
    """What the patterns mean on each backbone.

    Errors: NotFound for a name that nothing has; Mismatch for an SAE of a backbone not chosen; and
    for an SAE that was typed by name, whatever is wrong with its entry.
    """
    patterns = list(patterns)
    found = {b.name: candidates(registry, b) for b in backbones}
    refused = [refusal for one in found.values() for refusal in one.refused]
    if not patterns:
        refs = {b.name: default_choice(found[b.name].refs, suite, b.site) for b in backbones}
        return Choice(refs, tuple(refused))
    for refusal in refused:
        if any(pattern.partition("@")[0] == refusal.name for pattern in patterns):
            raise refusal.error
    meant = [r for r in refused if any(matches(r.name, pattern) for pattern in patterns)]
    matched = {pattern for pattern in patterns if any(matches(r.name, pattern) for r in meant)}
    chosen: dict[str, list[CoderRef]] = {}
    for backbone in backbones:
        refs = found[backbone.name].refs
        named = {(r.name, r.site, r.tokens): r for r in refs}
        picked: dict[tuple[str, str, str], CoderRef] = {}
        for pattern in patterns:
            hits = {key: ref for key, ref in named.items() if matches(ref.name, pattern)}
            hits = hits or _typed_pca(pattern, refs, backbone)
            if hits:
                matched.add(pattern)
                picked.update(hits)
        chosen[backbone.name] = list(picked.values())
    for pattern in patterns:
        if pattern not in matched:
            known = {ref.name for one in found.values() for ref in one.refs}
            _explain_unmatched(registry, backbones, known, pattern)
    return Choice(chosen, tuple(meant))


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means this name. Derived controls are meant only by a pattern with @."""
    return ("@" in name) == ("@" in pattern) and fnmatchcase(name, pattern)


def _typed_pca(
    pattern: str, refs: Sequence[CoderRef], backbone: BackboneSpec
) -> dict[tuple[str, str, str], CoderRef]:
    """`pca-12` by name, at every site and token set in use."""
    found = re.fullmatch(r"pca-(\d+)", pattern)
    if not found:
        return {}
    k = int(found[1])
    places = {(r.site, r.tokens) for r in refs if r.control == "identity"}
    for site, _ in places:
        width = backbone.sites[site].width
        if not 0 < k < width:
            raise Mismatch(
                f"'{pattern}' on '{backbone.name}': its site '{site}' has {width} dimensions",
                f"choose 0 < k < {width}",
            )
    return {(pattern, site, tokens): _pca(k, site, tokens) for site, tokens in sorted(places)}


def _explain_unmatched(
    registry: Registry, backbones: Sequence[BackboneSpec], known: set[str], pattern: str
) -> None:
    names = [backbone.name for backbone in backbones]
    sae_name = pattern.partition("@")[0]
    if not is_glob(pattern) and sae_name in registry.saes.files:
        spec = registry.sae(sae_name)
        if spec.backbone not in names:
            raise Mismatch(
                f"the SAE '{sae_name}' belongs to the backbone '{spec.backbone}', "
                f"not to {', '.join(names)}",
                f"saebench run --backbone {spec.backbone} --sae '{pattern}'",
            )
    raise not_found("saes", pattern, known | set(registry.saes), registry.saes.looked_in)
