"""The table a run prints: SAEs of each backbone beside the controls, with intervals and arrows.

    fvu ↓          lower is better; ↑ higher is better; no arrow: neither
    0.213 ±0.004   95 % bootstrap interval over images, half its width
    –              undefined (the row's note says why)

A pure function from rows to text. Which columns stand in it is a board (`leaderboards/`); a task
that the board does not know gets its first metric.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

ARROWS = {"lower": " ↓", "higher": " ↑", "one": " →1", "none": ""}


def print_tables(rows: pd.DataFrame, columns: Sequence[str], console: Console) -> None:
    """One table for each backbone, dataset, site and token set. `columns`: "task/metric"."""
    for table in tables(rows, columns):
        console.print(table)


def tables(rows: pd.DataFrame, columns: Sequence[str]) -> Iterable[Table]:
    """The tables, in the order in which the rows' backbones stand."""
    shown = rows[(rows["group"] == "all") & (rows["variant"] == "")]
    columns = complete(shown, columns)
    for _, place in shown.groupby(["backbone", "dataset", "site", "tokens"], sort=False):
        yield _table(place, columns)


def complete(rows: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """The board's columns that were measured, and the first metric of every other task."""
    there = dict.fromkeys(rows["task"] + "/" + rows["metric"])
    chosen = [column for column in columns if column in there]
    known = {column.partition("/")[0] for column in columns}
    for column in there:
        task = column.partition("/")[0]
        if task not in known:
            known.add(task)
            chosen.append(column)
    return chosen


def _table(rows: pd.DataFrame, columns: Sequence[str]) -> Table:
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    first = rows.iloc[0]
    n_images, n = int(rows["n_images"].max()), int(rows["n"].max())
    title = (
        f"[bold]{escape(first['backbone'])}[/] on {escape(first['dataset'])} · "
        f"{escape(first['site'])} ({escape(first['tokens'])}) · {n_images:,} images, {n:,} tokens"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="")
    table.add_column("", overflow="fold", min_width=18)
    better = {f"{r.task}/{r.metric}": r.better for r in rows.itertuples()}
    measured = [column for column in columns if column in better]
    for column in measured:
        name = column.partition("/")[2].replace("_fraction", "")
        table.add_column(name + ARROWS[better[column]], justify="right", no_wrap=True)

    cells = {(r.sae, f"{r.task}/{r.metric}"): r for r in rows.itertuples()}
    saes, controls = ordered(rows)
    for name in saes:
        table.add_row(Text(short(name, first["backbone"])), *_cells(cells, name, measured))
    if saes and controls:
        table.add_row(Text("controls", style="italic dim"))
    for name in controls:
        row = [f"[dim]{cell}[/]" for cell in _cells(cells, name, measured)]
        table.add_row(Text(short(name, first["backbone"]), style="dim"), *row)
    table.add_row("")
    return table


def ordered(rows: pd.DataFrame) -> tuple[list[str], list[str]]:
    """SAEs by their L0 and then their name; controls from the best to the emptiest."""
    l0 = rows[rows["metric"] == "l0"].set_index("sae")["value"].to_dict()
    is_control = rows.drop_duplicates("sae").set_index("sae")["sae_recipe"] == "control"
    saes = [name for name in is_control.index if not is_control[name]]
    saes.sort(key=lambda name: (round(l0.get(name, math.inf), 1), name))
    controls = [name for name in is_control.index if is_control[name]]
    return saes, sorted(controls, key=_control_order)


def _control_order(name: str) -> tuple[int, int, str]:
    kinds = ("identity", "pca", "mean", "zero", "@random", "@shuffled-decoder")
    place = next((i for i, kind in enumerate(kinds) if kind in name), len(kinds))
    rank = re.fullmatch(r"pca-(\d+)", name)
    return place, -int(rank[1]) if rank else 0, name


def _cells(cells: dict[tuple[str, str], Any], name: str, columns: Sequence[str]) -> list[str]:
    return [cell(cells[name, column]) if (name, column) in cells else "" for column in columns]


def cell(row: Any) -> str:
    """A value with half the width of its interval, both to the digits that the interval allows."""
    value = None if row.value is None or math.isnan(row.value) else float(row.value)
    if value is None:
        return "–"
    if row.ci_low is None or math.isnan(row.ci_low) or row.ci_high <= row.ci_low:
        return number(value)
    half = (row.ci_high - row.ci_low) / 2
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{value:.{min(digits, 5)}f} ±{half:.{min(digits, 5)}f}"


def number(value: float) -> str:
    """Three digits or so, without needless zeros."""
    if value == 0 or abs(value) >= 1e5 or abs(value) < 1e-4:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"


def short(name: str, backbone: str) -> str:
    """An SAE's name without the backbone that stands in the title."""
    return name.removeprefix(f"{backbone}/")
