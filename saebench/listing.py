"""What `saebench ls` prints. Reads entries; runs no task file and loads no torch."""

from __future__ import annotations

from collections.abc import Callable
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
