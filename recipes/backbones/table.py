"""Print the table of docs/embedded.md: `python -m recipes.backbones.table`."""

from __future__ import annotations

from collections.abc import Mapping

from recipes.backbones import entries, measure
from recipes.backbones.__main__ import RECIPES
from recipes.backbones.images import DATASETS

COLUMNS = (
    *(f"probe {name}" for name in DATASETS),
    *(f"head {name}" for name in DATASETS),
    *(f"zero-shot {name}" for name in DATASETS),
    "zero-shot families",
)


def row(name: str, weights: str, found: Mapping[str, float]) -> str:
    """One line of Markdown; accuracies in per cent."""
    cells = (f"{100 * found[c]:.1f}" if c in found else "" for c in COLUMNS)
    return f"| {name} | {weights} | " + " | ".join(cells) + " |"


def probes(encode: measure.Encode) -> dict[str, float]:
    """The probe's accuracy on each dataset, by column."""
    return {f"probe {name}": measure.probe(encode, name) for name in DATASETS}


def main() -> None:
    print("| features | weights | " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * (2 + len(COLUMNS)))
    print(row("pixels", "", probes(measure.pixels)), flush=True)
    for name in RECIPES:
        spec = entries.spec_of(name)
        print(row(f"`{name}`", "random", probes(measure.encoder(entries.fresh(spec)))), flush=True)
        print(row("", "trained", measure.everything(spec, entries.load(spec))), flush=True)


if __name__ == "__main__":
    main()
