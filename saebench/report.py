"""The table a run prints: SAEs of each backbone beside the controls, with intervals and arrows.

    fvu ↓          lower is better; ↑ higher is better; no arrow: neither
    0.213 ±0.004   95 % interval, half its width
    –              undefined (the row's note says why)

A pure function from rows to text. Which columns stand in it is a board (`leaderboards/`); a task
that the board does not know gets its first metric. Columns for which there is no room are left out,
from the last on, and named below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from saebench.sets import JOINED

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

Row = dict[str, Any]

ARROWS = {"lower": " ↓", "higher": " ↑", "one": " →1", "none": ""}
PLACE = ("backbone", "dataset", "site", "tokens", "variant")
LONGEST = 23  # characters of a name that leave room for four columns within 80
SHORTEST = 18  # and no fewer are left to one


def print_tables(rows: pd.DataFrame, columns: Sequence[str], console: Console) -> None:
    """One table for each backbone, dataset, site, token set and variant; columns: "task/metric"."""
    for table in tables(rows, columns, console):
        console.print(table)


def tables(rows: pd.DataFrame, columns: Sequence[str], console: Console) -> Iterator[Group]:
    """The tables, in the order in which the rows' backbones stand."""
    places: dict[tuple[str, ...], list[Row]] = {}
    for row in plain(rows).to_dict("records"):
        named = {str(key): value for key, value in row.items()}
        named["column"] = f"{named['task']}/{named['metric']}"
        places.setdefault(tuple(named[key] for key in PLACE), []).append(named)
    shown = complete((row["column"] for place in places.values() for row in place), columns)
    for place in places.values():
        yield _fitting(place, shown, console)


def plain(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that a table shows: of each SAE and task the default variant.

    Where options took its place, that is the shortest variant, and then the first of these. What
    was fitted on few shots stands beside it.
    """
    ours = rows.loc[(rows["group"] == "all") & ~rows["variant"].str.contains("convention=")]
    one = [ours[key] for key in ("backbone", "dataset", "site", "tokens", "sae", "task")]
    one.append(ours["variant"].str.extract(r"(?:^|;)(shots=\d+)", expand=False).fillna(""))
    n_keys = ours["variant"].str.count("=")
    fewest = ours.loc[n_keys == n_keys.groupby(one).transform("min")]
    first = fewest["variant"].groupby([key[fewest.index] for key in one]).transform("first")
    return fewest.loc[fewest["variant"] == first]


def complete(measured: Iterable[str], columns: Sequence[str]) -> list[str]:
    """The board's columns that were measured, and the first metric of every other task."""
    there = dict.fromkeys(measured)
    chosen = [column for column in columns if column in there]
    known = {column.partition("/")[0] for column in columns}
    for column in there:
        task = column.partition("/")[0]
        if task not in known:
            known.add(task)
            chosen.append(column)
    return chosen


def _fitting(rows: Sequence[Row], columns: Sequence[str], console: Console) -> Group:
    """The table of as many columns as there is room for, and the names of the others."""
    from rich.console import Group

    there = {row["column"]: heading(row) for row in rows}
    shown = [column for column in columns if column in there]
    left_out: list[str] = []
    # The names' column gives way, down to its least.
    while len(shown) > 1 and _width(rows, shown) > console.width:
        left_out.insert(0, there[shown.pop()])
    title, table = _table(rows, shown)
    if not left_out:
        return Group(title, table)
    said = f"no room for {', '.join(left_out)}: widen the terminal, or read the results\n"
    return Group(title, table, said)


def _width(rows: Sequence[Row], columns: Sequence[str]) -> int:
    """Characters that a table of these columns takes."""
    longest = {column: 0 for column in columns}
    names = [SHORTEST]
    for row in rows:
        lines = short(row["sae"], row["backbone"]).split("\n")
        names += [len(line) for line in lines if len(line) <= LONGEST]
        if row["column"] in longest:
            texts = heading(row), cell(row)
            longest[row["column"]] = max(longest[row["column"]], *map(len, texts))
    return max(names) + sum(width + 2 for width in longest.values())


def heading(row: Row) -> str:
    """A metric's name above a column, with an arrow to where it is better."""
    name = row["metric"].replace("_fraction", "").replace("loss_rec", "rec")
    return (
        name.replace("probe_delta_", "Δ ").replace("probe_accuracy_x", "probe x")
        + ARROWS[row["better"]]
    )


def _table(rows: Sequence[Row], columns: Sequence[str]) -> tuple[Text, Table]:
    from rich.table import Table
    from rich.text import Text

    first = rows[0]
    n_images, n = (max(int(row[key]) for row in rows) for key in ("n_images", "n"))
    # Not the table's own title, which would wrap at the table's width.
    title = Text.assemble(
        (first["backbone"], "bold"),
        f" on {first['dataset']} · {place(first['site'], first['tokens'])} · "
        f"{n_images:,} images" + (f", {n:,} tokens" if n > n_images else ""),
        f" · {first['variant']}" if first["variant"] else "",
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold", min_width=SHORTEST)
    headings = {row["column"]: heading(row) for row in rows}
    for column in columns:
        table.add_column(headings[column], justify="right", no_wrap=True)

    cells = {(row["sae"], row["column"]): cell(row) for row in rows}
    saes, controls = ordered(rows)
    for name in saes:
        values = [cells.get((name, column), "") for column in columns]
        table.add_row(Text(short(name, first["backbone"])), *values)
    if saes and controls:
        table.add_row(Text("controls", style="italic dim"))
    for name in controls:
        values = [Text(cells.get((name, column), ""), style="dim") for column in columns]
        table.add_row(Text(short(name, first["backbone"]), style="dim"), *values)
    table.add_row("")
    return title, table


def ordered(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """SAEs by their L0 and then their name; controls from the best to the emptiest."""
    l0 = {row["sae"]: row["value"] for row in rows if row["metric"] == "l0"}
    is_control = {row["sae"]: row["sae_recipe"] == "control" for row in rows}
    saes = [name for name in is_control if not is_control[name]]
    controls = [name for name in is_control if is_control[name]]
    return (
        sorted(saes, key=lambda name: (round(l0.get(name, math.inf), 1), name)),
        sorted(controls, key=_control_order),
    )


def _control_order(name: str) -> tuple[int, int, str]:
    kinds = ("identity", "pca", "mean", "zero", "@random", "@shuffled-decoder")
    place = next((i for i, kind in enumerate(kinds) if kind in name), len(kinds))
    rank = re.fullmatch(r"pca-(\d+)", name)
    return place, -int(rank[1]) if rank else 0, name


def cell(row: Row) -> str:
    """A value with half the width of its interval, both to the digits that the interval allows."""
    value, low, high = row["value"], row["ci_low"], row["ci_high"]
    if value is None or math.isnan(value):
        return "–"
    if low is None or not high > low:  # no interval, or one of no width
        return number(value)
    half = (high - low) / 2
    digits = min(max(0, 1 - math.floor(math.log10(half))), 5)
    return f"{value:.{digits}f} ±{half:.{digits}f}"


def number(value: float) -> str:
    """Four digits or so, without needless zeros."""
    if value == 0 or abs(value) >= 1e5 or abs(value) < 1e-4:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"


def place(site: str, tokens: str) -> str:
    """Where the rows of a table are from: a site and its tokens, or those of a set of SAEs."""
    sites = list(dict.fromkeys(site.split(JOINED)))
    kinds = ", ".join(dict.fromkeys(tokens.split(JOINED)))
    if len(sites) > 3:
        return f"{sites[0]} … {sites[-1]} ({len(sites)} sites; {kinds})"
    return f"{JOINED.join(sites)} ({kinds})"


def short(name: str, backbone: str) -> str:
    """An SAE's name without the backbone that stands in the title, a long one on two lines.

    Of a set each on a line of its own.
    """
    if JOINED in name:
        return f"\n{JOINED.lstrip()}".join(short(one, backbone) for one in name.split(JOINED))
    name = name.removeprefix(f"{backbone}/")
    return name if len(name) <= LONGEST else name.replace("@", "\n  @")
