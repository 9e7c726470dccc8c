"""What `saebench show` prints: where an entry comes from, what it says, and what of it is here.

Runs no task file, downloads nothing, and loads torch only for an SAE whose file is here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from saebench.data import Access, open_dataset
from saebench.errors import DataError, SaebenchError
from saebench.listing import KINDS, names_of, shelf_of
from saebench.registry import Registry, not_found
from saebench.specs import BackboneSpec, DatasetSpec, SaeSpec, SiteSpec
from saebench.taskfiles import TaskDescription, describe
from saebench.weights import HeadFile, published_heads
from saebench.whereabouts import is_here, whereabouts

if TYPE_CHECKING:
    from rich.console import Console


def print_show(
    registry: Registry, name: str, console: Console, access: Access | None = None
) -> int:
    """Print an entry. Returns 1 when its weights are not what it declares.

    `access` says where datasets lie. Errors: NotFound with the nearest names of every kind.
    """
    kinds = [kind for kind in KINDS if name in names_of(registry, kind)]
    if not kinds:
        known = [n for kind in KINDS for n in names_of(registry, kind)]
        looked = [str(origin.root) for origin in registry.origins]
        raise not_found("entries", name, known, looked)
    code = 0
    for kind in kinds:
        if kind == "tasks":
            _print_task(registry, name, console)
        else:
            code = max(code, _print_entry(registry, kind, name, console, access or Access()))
    return code


def _print_task(registry: Registry, name: str, console: Console) -> None:
    from rich.text import Text

    task = describe(registry, name)
    console.print(Text.assemble((name, "bold"), f"  task · {task.origin} · {task.path}"))
    console.print(Text(task.doc))
    console.print(Text("metrics: " + ", ".join(task.metrics)))
    for line in option_lines(task):
        console.print(Text(line), soft_wrap=True)


def option_lines(task: TaskDescription) -> Iterator[str]:
    """What a task leaves to its user: each choice with its default, its values and what it does."""
    if task.options:
        yield f"options, as  --option {task.name}.NAME=VALUE"
    for name, option in task.options.items():
        values = f"one of {', '.join(option.choices)}" if option.choices else ""
        yield "  " + " · ".join(filter(None, [f"{name} = {option.default}", option.doc, values]))


def _print_entry(registry: Registry, kind: str, name: str, console: Console, access: Access) -> int:
    from rich.text import Text

    shelf = shelf_of(registry, kind)
    spec, origin = shelf.get(name), shelf.origin(name)
    singular = {"saes": "SAE"}.get(kind, kind.removesuffix("s"))
    console.print(Text.assemble((name, "bold"), f"  {singular} · {origin.label} · {spec.path}"))
    for line in _lines(spec):
        console.print(Text(line), soft_wrap=True)
    if isinstance(spec, DatasetSpec):
        here = "\n".join(f"  {line}" for line in images_here(spec, access))
        console.print(Text(here), soft_wrap=True)
        return 0
    if not hasattr(spec, "weights"):
        return 0
    code = _print_weights(spec, console)
    if isinstance(spec, BackboneSpec):
        for head in published_heads(spec):
            code = max(code, _print_head(head, console))
    return code


def _print_weights(spec: Any, console: Console) -> int:
    from rich.text import Text

    try:
        found = whereabouts(spec)
    except SaebenchError as error:
        console.print(Text(f"error: {error}", style="red"))
        return 1
    if found is None:
        return 0
    style = "red" if found.wrong else ""
    console.print(Text(f"  {found.text}", style=style), soft_wrap=True)
    if isinstance(spec, SaeSpec) and not found.wrong:
        return _print_facts(spec, console)
    return 1 if found.wrong else 0


def _print_head(head: HeadFile, console: Console) -> int:
    """Where a published linear head is. One that is not here is none of the backbone's faults."""
    from rich.text import Text

    try:
        found = whereabouts(head)
    except SaebenchError as error:
        console.print(Text(f"  linear head, {error}", style="yellow"), soft_wrap=True)
        return 0
    if found is None:
        return 0
    text = f"  linear head of {head.classes}, {found.text}"
    console.print(Text(text, style="red" if found.wrong else ""), soft_wrap=True)
    return 1 if found.wrong else 0


def _print_facts(spec: SaeSpec, console: Console) -> int:
    """The format, what decides the output and who says it, and what nobody says yet.

    Returns 1 for a file that cannot be read; one that has to be told more is none of these.
    """
    from rich.text import Text

    if not is_here(spec):
        return 0
    from saebench.formats import read_entry
    from saebench.formats.facts import MissingFacts
    from saebench.record import shown

    try:
        record = read_entry(spec).record
    except MissingFacts as error:
        console.print(Text(f"  {error}", style="yellow"), soft_wrap=True)
        return 0
    except SaebenchError as error:
        console.print(Text(f"error: {error}", style="red"), soft_wrap=True)
        return 1
    console.print(Text(f"  the format is {record.format}"), soft_wrap=True)
    for line in shown(record):
        console.print(Text(f"  {line}"), soft_wrap=True)
    return 0


def images_here(spec: DatasetSpec, access: Access) -> Iterator[str]:
    """Lines that say how many images of a dataset are on this machine, or where they were sought.

    Of a stream, a hundred images of each split are listed.
    """
    first = {spec.train: 100, spec.test: 100}
    try:
        dataset = open_dataset(spec, dataclasses.replace(access, first=first, download=False))
        counts = [f"{len(dataset.manifest(s)):,} {s}" for s in (spec.train, spec.test)]
    except DataError as error:
        yield "not on this machine:"
        yield from (f"  {line.strip()}" for line in str(error).splitlines())
    else:
        n_classes = len(dataset.class_names)
        yield f"on this machine: {' and '.join(counts)} images of {n_classes:,} classes"


def _lines(spec: Any, indent: str = "  ") -> Iterator[str]:
    """`key = value` for every field that says something, nested ones indented."""
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name in ("name", "path") or value in (None, "", (), {}):
            continue
        if value is False and field.default is False:
            continue
        yield from _line(field.name, value, indent)


def _line(key: str, value: Any, indent: str) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        yield f"{indent}{key}"
        yield from _lines(value, indent + "  ")
    elif key == "linear":
        for name, weights in value.items():
            yield from _line(f"{key}.{name}", weights, indent)
    elif key == "sites":
        yield f"{indent}{key}"
        yield from (f"{indent}  {line}" for line in site_lines(value))
    else:
        yield f"{indent}{key} = {value}"


def site_lines(sites: Mapping[str, SiteSpec]) -> Iterator[str]:
    """One line a site; a run of blocks that differ in their number alone is one line.

    `blocks.0 … blocks.11: path=blocks.*, width=768, cls=1, grid=(14, 14)`
    """
    for said, run in groupby(sites.items(), key=lambda item: _said(*item)):
        names = [name for name, _ in run]
        name = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        yield f"{name}: {said if len(names) > 1 else _said(names[0], sites[names[0]], fold=False)}"


def _said(name: str, site: SiteSpec, *, fold: bool = True) -> str:
    """What a site's entry says, its block's number replaced by a star where that is to fold."""
    fields = {f.name: getattr(site, f.name) for f in dataclasses.fields(site)}
    if fold and (number := re.search(r"\d+", name)):
        fields["path"] = re.sub(rf"\b{number[0]}\b", "*", site.path, count=1)
    usual = {"side": "output", "kind": "bottleneck"}
    return ", ".join(
        f"{key}={value}"
        for key, value in fields.items()
        if value not in (None, 0, "") and usual.get(key) != value
    )
