"""`saebench fetch`: downloads ahead of time what runs will need, and locks what came.

A login node has internet and a compute node has none: after this, with the same HF_HOME and the
same lock file, a run asks nobody. One line for each file says what it is and whether it was there
already; a failure is printed, and the rest goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from saebench import hub, lock
from saebench.data import Access, open_dataset
from saebench.errors import SaebenchError, UsageError
from saebench.modelfiles import config_wanted
from saebench.registry import Registry, not_found
from saebench.specs import BackboneSpec, DatasetSpec, SaeSpec
from saebench.weights import wanted, weights_path

if TYPE_CHECKING:
    from rich.console import Console

Spec = BackboneSpec | SaeSpec | DatasetSpec


@dataclass(frozen=True)
class Got:
    """One thing that an entry needs, now on this machine."""

    what: str
    here: bool  # it was there already


def fetch(
    registry: Registry,
    patterns: Sequence[str],
    console: Console,
    *,
    access: Access | None = None,
    update: bool = False,
) -> int:
    """Fetch what matches: backbones, SAEs and datasets by name or glob. Returns 1 if any failed.

    `update`: what is locked is asked for anew. Errors: UsageError without patterns, NotFound for
    one that matches nothing.
    """
    if not patterns:
        raise UsageError("fetch what?", "saebench fetch NAME…  (saebench ls backbones)")
    failed = 0
    for name, shelf in _matches(registry, patterns):
        try:
            spec: Spec = shelf.get(name)
            for got in _updated(spec, access) if update else _parts(spec, access):
                mark = "here already" if got.here else "fetched"
                console.print(f"{name}   {got.what}   {mark}", markup=False, soft_wrap=True)
        except SaebenchError as error:
            console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            failed = 1
    return failed


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
    """As `_parts`, with what is locked forgotten first, and put back where that fails."""
    before = lock.forget(_repositories(spec))
    try:
        return list(_parts(spec, access))
    except SaebenchError:
        lock.forget(_repositories(spec))
        for asked, found in before.items():
            lock.keep(asked, found)
        raise


def _repositories(spec: Spec) -> set[tuple[lock.Kind, str]]:
    if isinstance(spec, DatasetSpec):
        return {("dataset", spec.hub.repo)} if spec.hub else set()
    files = [wanted(spec)]
    if isinstance(spec, BackboneSpec):
        files += [config_wanted(spec), _tokenizer_wanted(spec)]
    return {("model", file.repo) for file in files if file}


def _parts(spec: Spec, access: Access | None) -> Iterator[Got]:
    """Everything that an entry needs, fetched one after the other."""
    if isinstance(spec, DatasetSpec):
        said = open_dataset(spec, access).fetch()
        yield Got(said or "a dataset that needs no download", not said)
        return
    if isinstance(spec, BackboneSpec) and (config := config_wanted(spec)):
        yield _file(config)
    if there := wanted(spec):
        yield _file(there)
    elif path := weights_path(spec):
        yield Got(f"{path}   {path.stat().st_size:,} bytes", True)
    else:
        yield Got("brings its own weights", True)
    if isinstance(spec, BackboneSpec) and (last := _tokenizer_wanted(spec)):
        from saebench.backbones.tokenizers import fetch_tokenizer

        here = hub.cached(last) is not None
        fetch_tokenizer(spec)
        yield Got(f"tokenizer of {last.repo} at {hub.resolve(last).commit}", here)


def _tokenizer_wanted(spec: BackboneSpec) -> hub.Wanted | None:
    """The last file of the tokenizer that zero-shot texts need; None where none is of a hub."""
    if spec.loader != "open_clip" or spec.head.kind != "zero_shot":
        return None
    from saebench.backbones.tokenizers import tokenizer_wanted

    return tokenizer_wanted(spec)


def _file(wanted: hub.Wanted) -> Got:
    here = hub.cached(wanted) is not None
    path = hub.fetch(wanted)
    found = hub.resolve(wanted)
    size = path.stat().st_size
    return Got(f"{found.file} of {wanted.repo} at {found.commit}   {size:,} bytes", here)
