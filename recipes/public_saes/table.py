"""The table of docs/public_saes.md: a row for each series."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from recipes.public_saes.entry import Entry

_COLUMNS = (
    "SAEs",
    "",
    "site",
    "tokens",
    "latents",
    "activation",
    "L0",
    "trained on",
    "licence",
    "paper",
    "to settle first",
)
_SETTLES = {
    "filename": "which file",
    "configuration": "which configuration",
    "input": "`input`",
    "get the file": "get the file by hand",
}


def table(entries: Iterable[Entry]) -> str:
    """A row for each series, in Markdown, in the order of the entries."""
    series: dict[str, list[Entry]] = {}
    for entry in entries:
        series.setdefault(entry.series, []).append(entry)
    return "\n".join(_lines(series))


def _lines(series: dict[str, list[Entry]]) -> Iterator[str]:
    yield f"| {' | '.join(_COLUMNS)} |"
    yield f"|{'---|' * len(_COLUMNS)}"
    for name, members in series.items():
        one = members[0]
        cells = (
            f"`{name}`",
            str(len(members)),
            _sites(members),
            " or ".join(dict.fromkeys(entry.tokens for entry in members)),
            ", ".join(filter(None, [_range([e.s for e in members]), _doubt(members)])),
            one.architecture,
            _range([entry.l0 for entry in members]),
            one.trained_on or "?",
            one.licence or "?",
            f"[{one.paper.removeprefix('https://').partition('/')[0]}]({one.paper})",
            _to_settle(members),
        )
        yield f"| {' | '.join(cells)} |"


def _sites(members: Sequence[Entry]) -> str:
    sites = list(dict.fromkeys(entry.site for entry in members))
    shown = sites if len(sites) < 3 else [sites[0], "…", sites[-1]]
    return " ".join(f"`{site}`" if site != "…" else site for site in shown)


def _range(values: Sequence[float | None]) -> str:
    said = [value for value in values if value is not None]
    if not said:
        return ""
    low, high = (f"{round(value, 1):,}".removesuffix(".0") for value in (min(said), max(said)))
    return low if low == high else f"{low} to {high}"


def _doubt(members: Sequence[Entry]) -> str:
    return "?" if any(entry.s is None for entry in members) else ""


def _to_settle(members: Sequence[Entry]) -> str:
    """What is open in all, and in how many where it is in some."""
    open_in: dict[str, int] = {}
    for entry in members:
        for key in entry.to_settle:
            open_in[key] = open_in.get(key, 0) + 1
    return ", ".join(
        _SETTLES[key] + ("" if n == len(members) else f" ({n} of {len(members)})")
        for key, n in open_in.items()
    )
