"""What `saebench ls` prints. Reads entries; runs no task file and loads no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from saebench.errors import SaebenchError
from saebench.registry import Registry, Shelf
from saebench.taskfiles import describe

if TYPE_CHECKING:
    from rich.console import Console

KINDS = ("backbones", "datasets", "tasks", "saes", "leaderboards")


def print_ls(registry: Registry, kind: str | None, glob: str, console: Console) -> int:
    """List one kind, or all. Returns 1 when an entry cannot be read, after listing the others."""
    broken = 0
    for one in (kind,) if kind else KINDS:
        if kind is None and glob == "*" and one == "saes":
            _print_kind(one, folded(registry), console)  # there may be thousands
            console.print("  saebench ls saes 'FOLDER/*'  lists them", style="dim")
            continue
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
    for name in names_of(registry, kind):
        if fnmatchcase(name, glob):
            try:
                rows.append((name, *_summary(registry, kind, name)))
            except SaebenchError as error:
                errors.append(error)
    return rows, errors


def names_of(registry: Registry, kind: str) -> list[str]:
    return list(registry.task_files) if kind == "tasks" else list(shelf_of(registry, kind))


def shelf_of(registry: Registry, kind: str) -> Shelf[Any]:
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
    spec = shelf_of(registry, kind).get(name)
    origin = shelf_of(registry, kind).origin(name).label
    text: Callable[[Any], str] = {
        "backbones": lambda s: " · ".join(filter(None, [s.pretraining, s.corpus])),
        "datasets": lambda s: s.description,
        "saes": lambda s: " · ".join(
            filter(None, [s.architecture, f"L0 {s.l0:.3g}" if s.l0 else "", s.site, s.tokens])
        ),
        "leaderboards": lambda s: s.title,
    }[kind]
    return text(spec), origin


def folded(registry: Registry) -> list[tuple[str, str, str]]:
    """How many SAEs each folder has, by its glob; none of them is read."""
    counts: dict[str, int] = {}
    for name in registry.saes:
        folder = name.rpartition("/")[0]
        counts[folder] = counts.get(folder, 0) + 1
    return [(f"{folder}/*", f"{n} SAE{'s' if n > 1 else ''}", "") for folder, n in counts.items()]


def _print_kind(kind: str, rows: list[tuple[str, str, str]], console: Console) -> None:
    from rich.text import Text

    console.print(Text(kind if kind != "saes" else "SAEs", style="bold"))
    for line, origin in lines(rows, _width(console)) or [("  none", "")]:
        console.print(Text.assemble(line, (origin, "dim")), soft_wrap=True)


def _width(console: Console) -> int | None:
    """Of the terminal; of a pipe what $COLUMNS says, and None where that says nothing."""
    said = os.environ.get("COLUMNS", "")
    return console.width if console.is_terminal else int(said) if said.isdecimal() else None


def lines(rows: Sequence[tuple[str, str, str]], width: int | None) -> list[tuple[str, str]]:
    """(name and what it is, origin) of each row, aligned; in `width` characters where there is one.

    Where a row is wider, no origin is shown, and the end of what it is is left out. A name is never
    cut, since it is there to be typed; long ones push what they are out of its column.
    """
    column = max((len(name) for name, _, _ in rows), default=0)
    second = max((len(text) for _, text, _ in rows), default=0)
    third = max((len(origin) for _, _, origin in rows), default=0)
    if width is None or 2 + column + 2 + second + 2 + third <= width:
        return [
            (f"  {name:<{column}}  {text:<{second if origin else 0}}", origin and f"  {origin}")
            for name, text, origin in rows
        ]
    column = min(column, width // 2)
    return [
        (_cut(f"  {name:<{column}}  {text}", len(name) + 2, width), "") for name, text, _ in rows
    ]


def _cut(line: str, least: int, width: int) -> str:
    """A line in `width` characters, but not less than its first `least`."""
    if len(line) <= width:
        return line
    cut = line[: max(width - 1, least)].rstrip()
    return cut + "…" if len(cut) > least else line[:least]
