"""`saebench fetch`: downloads ahead of time what runs will need, and locks what came.

A login node has internet and a compute node has none: after this, with the same HF_HOME and the
same lock file, a run asks nobody. One line for each file says what it is and whether it was there
already; a failure is printed, and the rest goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

from saebench import hub, lock
from saebench.address import hub_files
from saebench.beside import beside_wanted
from saebench.data import Access, open_dataset
from saebench.errors import SaebenchError, UsageError, WeightsError
from saebench.lock import Asked, Locked
from saebench.modelfiles import config_wanted, text_candidates, text_wanted
from saebench.registry import Registry, not_found
from saebench.specs import BackboneSpec, DatasetSpec, SaeSpec
from saebench.weights import (
    HUB_MODEL,
    Entry,
    HeadFile,
    published_heads,
    wanted,
    weights_path,
)

if TYPE_CHECKING:
    from rich.console import Console

Spec = BackboneSpec | SaeSpec | DatasetSpec


@dataclass(frozen=True)
class Got:
    """One thing that an entry needs, now on this machine; or how to put it there by hand."""

    what: str
    here: bool  # it was there already
    by_hand: bool = False  # it is not here: no hub has it


def fetch(
    registry: Registry,
    patterns: Sequence[str],
    console: Console,
    *,
    access: Access | None = None,
    update: bool = False,
) -> int:
    """Fetch what matches: backbones, SAEs and datasets by name or glob; and checkpoints on the hub,
    `hf-hub:owner/name[@revision][/path]`, for `load_sae`. Returns 1 if any failed.

    `update`: what is locked is asked for anew, and what else moves with it is said. Errors:
    UsageError without patterns, NotFound for one that matches nothing.
    """
    if not patterns:
        raise UsageError("fetch what?", "saebench fetch NAME…  (saebench ls backbones)")
    failed = 0
    before = lock.everything() if update else {}
    addresses = [pattern for pattern in patterns if pattern.startswith(HUB_MODEL)]
    matches = _matches(registry, [one for one in patterns if one not in addresses])
    wishes = [(name, partial(_entry, shelf, name, access, update)) for name, shelf in matches]
    wishes += [(address, partial(_checkpoint, address)) for address in addresses]
    for name, parts in wishes:
        try:
            for got in parts():
                mark = "here already" if got.here else "not here" if got.by_hand else "fetched"
                console.print(f"{name}   {got.what}   {mark}", markup=False, soft_wrap=True)
        except SaebenchError as error:
            console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            failed = 1
    if update:
        for line in _moved(registry, {name for name, _ in matches}, before):
            console.print(line, markup=False, soft_wrap=True)
    return failed


def _entry(shelf: Any, name: str, access: Access | None, update: bool) -> Iterable[Got]:
    spec: Spec = shelf.get(name)
    return _updated(spec, access) if update else _parts(spec, access)


def _checkpoint(address: str) -> Iterable[Got]:
    weights, beside = hub_files(address)
    yield from map(_file, (weights, *beside.values()))


def _matches(registry: Registry, patterns: Sequence[str]) -> list[tuple[str, Any]]:
    shelves = (registry.backbones, registry.saes, registry.datasets)
    found: dict[tuple[str, str], tuple[str, Any]] = {}
    for pattern in patterns:
        chosen = [
            (name, shelf) for shelf in shelves for name in shelf if fnmatchcase(name, pattern)
        ]
        if not chosen:
            looked = [str(origin.root) for origin in registry.origins]
            raise not_found("entries", pattern, [n for shelf in shelves for n in shelf], looked)
        found |= {(of.kind, name): (name, of) for name, of in chosen}
    return list(found.values())


def _updated(spec: Spec, access: Access | None) -> list[Got]:
    """As `_parts`, with all asked anew. What ends it before its end leaves the lock as it was."""
    with lock.updating() as update:
        got = list(_parts(spec, access))
        for asked in update.outdated():
            file = hub.Wanted(
                asked.repo, tuple(asked.file.split(" or ")), spec.name, asked.revision
            )
            with suppress(WeightsError):  # it is no more: then it is not locked any longer
                hub.resolve(file)
    return got


def _moved(
    registry: Registry, updated: Collection[str], before: dict[Asked, Locked]
) -> Iterator[str]:
    """What an update moved that it was not asked for, since it lies in the same repositories."""
    now, owned = lock.everything(), set[Asked]()
    moved = {
        asked: f"{asked.file} of {asked.repo}" if asked.file else asked.repo
        for asked, old in before.items()
        if not old.same(now.get(asked))
    }
    for shelf in (registry.backbones, registry.saes, registry.datasets) if moved else ():
        for name in shelf:
            try:
                asked = _asked(shelf.get(name))
            except SaebenchError:
                continue  # an entry that cannot be read is measured by nobody
            owned |= asked
            if name not in updated and (mine := sorted({moved[a] for a in asked & set(moved)})):
                yield f"also moves: {name}   {', '.join(mine)}; get it by  saebench fetch {name}"
    for other in sorted(set(moved) - owned):  # of entries elsewhere that share the lock
        yield f"also moves: {moved[other]}"


def _parts(spec: Spec, access: Access | None) -> Iterator[Got]:
    """Everything that an entry needs, fetched one after the other."""
    if isinstance(spec, DatasetSpec):
        said = open_dataset(spec, access).fetch()
        yield Got(said or "a dataset that needs no download", not said)
        return
    if isinstance(spec, BackboneSpec) and (config := config_wanted(spec)):
        yield _file(config)
    yield _weights(spec)
    if isinstance(spec, SaeSpec) and wanted(spec):
        yield from map(_file, beside_wanted(spec).values())
    if isinstance(spec, BackboneSpec):
        if spec.head.kind == "zero_shot":
            yield from map(_file, text_wanted(spec))
        yield from map(_head, published_heads(spec))


def _weights(spec: Entry) -> Got:
    if there := wanted(spec):
        return _file(there)
    if path := weights_path(spec):
        return Got(f"{path}   {path.stat().st_size:,} bytes", True)
    return Got("brings its own weights", True)


def _head(head: HeadFile) -> Got:
    """A published linear head. Most tasks do without, so one that is not here is no failure."""
    try:
        return _weights(head)
    except WeightsError as error:
        if wanted(head) is None and head.weights.url:
            return Got(f"linear head of {head.classes}: {error.hint}", False, by_hand=True)
        raise


def _asked(spec: Spec) -> set[Asked]:
    """What an entry asks of hubs, as far as that is known without asking them."""
    if isinstance(spec, DatasetSpec):
        return {Asked("dataset", spec.hub.repo, spec.hub.revision or "")} if spec.hub else set()
    files = [wanted(spec)]
    if isinstance(spec, SaeSpec):
        files += beside_wanted(spec).values()
    else:
        config = config_wanted(spec)
        files.append(config)
        if spec.head.kind == "zero_shot" and (config is None or hub.cached(config)):
            files += text_candidates(spec)
        files += [wanted(head) for head in published_heads(spec)]
    return {file.asked for file in files if file}


def _file(wanted: hub.Wanted) -> Got:
    here = hub.cached(wanted) is not None
    path = hub.fetch(wanted)
    found = hub.resolve(wanted)
    size = path.stat().st_size
    return Got(f"{found.file} of {wanted.repo} at {found.commit}   {size:,} bytes", here)
