"""What `saebench ls` and `show` print. Reads entries; runs no task file and loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from saebench.errors import SaebenchError
from saebench.registry import Registry, Shelf, not_found
from saebench.taskfiles import describe
from saebench.whereabouts import whereabouts

if TYPE_CHECKING:
    from rich.console import Console

KINDS = ("backbones", "datasets", "tasks", "saes", "leaderboards")


def print_ls(registry: Registry, kind: str | None, glob: str, console: Console) -> int:
    """List one kind, or all. Returns 1 when an entry cannot be read, after listing the others."""
    broken = 0
    for one in (kind,) if kind else KINDS:
        if kind is None and glob == "*" and one == "saes":
            rows, errors = folded(registry), []  # there may be thousands
        else:
            rows, errors = listing(registry, one, glob)
        _print_kind(one, rows, console)
        for error in errors:
            console.print(f"error: {error}", style="red", markup=False)
        broken += len(errors)
    return 1 if broken else 0


def listing(
    registry: Registry, kind: str, glob: str = "*"
) -> tuple[list[tuple[str, str, str]], list[SaebenchError]]:
    """(name, what it is, origin) of every entry of a kind that matches, and what was unreadable."""
    rows, errors = [], []
    for name in _names(registry, kind):
        if fnmatchcase(name, glob):
            try:
                rows.append((name, *_summary(registry, kind, name)))
            except SaebenchError as error:
                errors.append(error)
    return rows, errors


def _names(registry: Registry, kind: str) -> list[str]:
    return list(registry.task_files) if kind == "tasks" else list(_shelf(registry, kind))


def _shelf(registry: Registry, kind: str) -> Shelf[Any]:
    return {
        "backbones": registry.backbones,
        "datasets": registry.datasets,
        "saes": registry.saes,
        "leaderboards": registry.boards,
    }[kind]


def _summary(registry: Registry, kind: str, name: str) -> tuple[str, str]:
    if kind == "tasks":
        task = describe(registry, name)
        return task.title, task.origin
    spec = _shelf(registry, kind).get(name)
    origin = _shelf(registry, kind).origin(name).label
    text: Callable[[Any], str] = {
        "backbones": lambda s: " · ".join(filter(None, [s.family, s.pretraining, s.corpus])),
        "datasets": lambda s: s.description,
        "saes": lambda s: " · ".join(
            filter(None, [s.architecture, f"L0 {s.l0:.3g}" if s.l0 else "", s.site, s.tokens])
        ),
        "leaderboards": lambda s: s.title,
    }[kind]
    return text(spec), origin


def folded(registry: Registry) -> list[tuple[str, str, str]]:
    """How many SAEs each folder has; none of them is read."""
    counts: dict[str, int] = {}
    for name in registry.saes:
        folder = name.rpartition("/")[0]
        counts[folder] = counts.get(folder, 0) + 1
    return [
        (f"{folder}/…", f"{n} SAE{'s' if n > 1 else ''}   saebench ls saes '{folder}/*'", "")
        for folder, n in counts.items()
    ]


def _print_kind(kind: str, rows: list[tuple[str, str, str]], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text(kind if kind != "saes" else "SAEs", style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, text, origin in rows:
        table.add_row(Text(f"  {name}"), Text(text), Text(origin, style="dim"))
    if not rows:
        table.add_row("  none")
    console.print(table)


def print_show(registry: Registry, name: str, console: Console) -> int:
    """Print an entry. Returns 1 when its weights are not what it declares.

    Errors: NotFound with the nearest names of every kind.
    """
    kinds = [kind for kind in KINDS if name in _names(registry, kind)]
    if not kinds:
        known = [n for kind in KINDS for n in _names(registry, kind)]
        looked = [str(origin.root) for origin in registry.origins]
        raise not_found("entries", name, known, looked)
    code = 0
    for kind in kinds:
        if kind == "tasks":
            _print_task(registry, name, console)
        else:
            code = max(code, _print_entry(registry, kind, name, console))
    return code


def _print_task(registry: Registry, name: str, console: Console) -> None:
    from rich.text import Text

    task = describe(registry, name)
    console.print(Text.assemble((name, "bold"), f"  task · {task.origin} · {task.path}"))
    console.print(Text(task.doc))
    console.print(Text("metrics: " + ", ".join(task.metrics)))


def _print_entry(registry: Registry, kind: str, name: str, console: Console) -> int:
    from rich.text import Text

    shelf = _shelf(registry, kind)
    spec, origin = shelf.get(name), shelf.origin(name)
    singular = {"saes": "SAE"}.get(kind, kind.removesuffix("s"))
    console.print(Text.assemble((name, "bold"), f"  {singular} · {origin.label} · {spec.path}"))
    for line in _lines(spec):
        console.print(Text(line))
    if not hasattr(spec, "weights"):
        return 0
    return _print_hash(spec, console)


def _print_hash(spec: Any, console: Console) -> int:
    from rich.text import Text

    try:
        found = whereabouts(spec)
    except SaebenchError as error:
        console.print(Text(f"error: {error}", style="red"))
        return 1
    if found is None:
        return 0
    console.print(Text(f"  {found.text}", style="red" if found.wrong else ""))
    return 1 if found.wrong else 0


def _lines(spec: Any, indent: str = "  ") -> Iterator[str]:
    """`key = value` for every field that says something, nested ones indented."""
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name in ("name", "path") or value in (None, "", (), {}, False):
            continue
        yield from _line(field.name, value, indent)


def _line(key: str, value: Any, indent: str) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        yield f"{indent}{key}"
        yield from _lines(value, indent + "  ")
    elif isinstance(value, dict) and any(dataclasses.is_dataclass(v) for v in value.values()):
        yield f"{indent}{key}"
        for name, item in value.items():
            fields = ((f.name, getattr(item, f.name)) for f in dataclasses.fields(item))
            said = ", ".join(
                f"{k}={v}" for k, v in fields if v not in (None, 0, "") and k != "side"
            )
            yield f"{indent}  {name}: {said}"
    else:
        yield f"{indent}{key} = {value}"
