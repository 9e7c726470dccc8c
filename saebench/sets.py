"""Which SAEs are spliced together, `saebench run --splice-together`: one set for each backbone.

All that is chosen on a backbone is replaced at once, each SAE at its own site, so that every token
is replaced by at most one of them. The set is a `CoderRef` with `members`, in the order in which a
forward pass meets their sites: it does not depend on the order in which they were named. One SAE
alone is not a set but that SAE, whose rows are those of any run.

By default the set is every SAE of the backbone; controls are in it where they are named. One that
stands at a site for several token sets (`identity` for all tokens and for CLS) is there once, for
the largest of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from saebench.coders import Choice, CoderRef, token_kinds
from saebench.errors import UsageError
from saebench.registry import Registry
from saebench.specs import BackboneSpec
from saebench.task import Task
from saebench.units import root_site

JOINED = " + "


def splicing_tasks(tasks: Sequence[type[Task]], named: Sequence[str]) -> list[type[Task]]:
    """Of the tasks of a run those that can measure a set. `named`: what was typed after --task.

    Errors: UsageError for another task that was named, or where none is left.
    """
    able = [task for task in tasks if task.splices]
    for task in tasks:
        if not task.splices and task.name in named:
            raise UsageError(
                f"the task '{task.name}' measures SAEs one by one, not spliced together",
                f"together:  --task {able[0].name}" if able else "leave out --splice-together",
            )
    if not able:
        raise UsageError(
            "none of these tasks measures SAEs that are spliced together: "
            + ", ".join(task.name for task in tasks),
            "loss_substitution does",
        )
    return able


def spliced_together(
    choice: Choice, registry: Registry, backbones: Sequence[BackboneSpec], *, default: bool
) -> Choice:
    """The chosen SAEs of every backbone as one set. `default`: none was named.

    Errors: UsageError where several replace the same tokens of a site, or where nothing was chosen.
    """
    sets: dict[str, list[CoderRef]] = {}
    for backbone in backbones:
        refs = choice.refs[backbone.name]
        if default:
            refs = [ref for ref in refs if ref.is_sae]
        sets[backbone.name] = [together(registry, backbone, refs)] if refs else []
    if not any(sets.values()) and not choice.refused:
        names = ", ".join(backbone.name for backbone in backbones)
        raise UsageError(
            f"there is no SAE of {names} to splice",
            "saebench ls saes   lists what there is; controls are named:  --sae identity",
        )
    return Choice(sets, choice.refused)


def together(registry: Registry, backbone: BackboneSpec, refs: Sequence[CoderRef]) -> CoderRef:
    """One set of some SAEs and controls of a backbone; the SAE itself where there is one.

    Errors: UsageError where several replace the same tokens of a site.
    """
    placed = _once_a_site(registry, backbone, refs)
    _check_apart(backbone, placed)
    order = {site: place for place, site in enumerate(model_order(backbone))}

    def along(ref: CoderRef) -> tuple[int, int, str]:
        site, kinds = placed[ref]
        return order[site], list(backbone.sites[site].kinds).index(kinds[0]), ref.name

    members = tuple(sorted(placed, key=along))
    if len(members) == 1:
        return members[0]
    return CoderRef(
        JOINED.join(ref.name for ref in members),
        JOINED.join(ref.site for ref in members),
        JOINED.join(ref.tokens for ref in members),
        depth=max(ref.depth for ref in members),
        members=members,
    )


def model_order(backbone: BackboneSpec) -> list[str]:
    """The sites of a backbone as a forward pass meets them, as far as its entry tells.

    That is by the numbers of the modules (`blocks.2` before `blocks.10`), modules of other names as
    the entry first has them, and what lies within a module before that module's output.
    """
    first_seen: dict[tuple[str, str], int] = {}

    def along(name: str) -> tuple[tuple[float, int], ...]:
        site, above, key = backbone.sites[name], "", []
        for part in site.path.split("."):
            stem = part.rstrip("0123456789")
            seen = first_seen.setdefault((above, stem), len(first_seen))
            key.append((seen, int(part.removeprefix(stem) or -1)))
            above = f"{above}.{part}"
        return *key, (math.inf if site.side == "output" else -math.inf, 0)

    keys = {name: along(name) for name in backbone.sites}
    return sorted(keys, key=lambda name: keys[name])


Placed = dict[CoderRef, tuple[str, tuple[str, ...]]]
"""Reference -> the backbone's own site, and the token kinds there that it covers."""


def _once_a_site(registry: Registry, backbone: BackboneSpec, refs: Sequence[CoderRef]) -> Placed:
    """Where each is; of a control by one name at one site, the largest of its token sets."""
    placed: Placed = {}
    for ref in refs:
        site = root_site(registry, ref)
        placed[ref] = site, token_kinds(backbone.sites[site], ref.tokens, who=ref.name)

    def within_another(ref: CoderRef) -> bool:
        site, kinds = placed[ref]
        return ref.sae is None and any(
            other.name == ref.name and there == site and set(kinds) < set(covered)
            for other, (there, covered) in placed.items()
        )

    return {ref: place for ref, place in placed.items() if not within_another(ref)}


def _check_apart(backbone: BackboneSpec, placed: Placed) -> None:
    by_tokens: dict[tuple[str, str], list[CoderRef]] = {}
    for ref, (site, kinds) in placed.items():
        for kind in kinds:
            by_tokens.setdefault((site, kind), []).append(ref)
    for (site, kind), refs in by_tokens.items():
        if len(refs) > 1:
            shown = [f"'{ref.name}'" for ref in refs]
            more = [f"{len(shown) - 6} more"] if len(shown) > 6 else []
            raise UsageError(
                f"{', '.join(shown[: 6 if more else None] + more)} replace the same tokens "
                f"({kind}) at '{site}' of '{backbone.name}': of these one can be in the set",
                f"choose one a site:  --splice-together --sae {refs[0].name} …  "
                "(and one for each other site)",
            )
