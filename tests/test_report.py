from __future__ import annotations

from io import StringIO
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from saebench.report import cell, complete, ordered, place, print_tables

COLUMNS = ["sparsity/l0", "reconstruction/fvu"]


def row(sae: str, metric: str = "fvu", value: float | None = 0.5, **changes: Any) -> dict[str, Any]:
    task = {"fvu": "reconstruction", "l0": "sparsity"}.get(metric, "mine")
    defaults = {
        "backbone": "b",
        "dataset": "shapes",
        "site": "blocks.2",
        "tokens": "all",
        "sae": sae,
        "sae_recipe": "topk",
        "task": task,
        "metric": metric,
        "group": "all",
        "variant": "",
        "better": "lower" if metric == "fvu" else "none",
        "value": value,
        "ci_low": None,
        "ci_high": None,
        "n": 1000,
        "n_images": 10,
    }
    return {**defaults, **changes}


def printed(rows: list[dict[str, Any]], width: int = 80) -> str:
    text = StringIO()
    print_tables(pd.DataFrame(rows), COLUMNS, Console(file=text, width=width))
    return text.getvalue()


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.21334, 0.2093, 0.2173, "0.2133 ±0.0040"),
        (15.87, 15.2, 16.4, "15.87 ±0.60"),
        (1234.5, 1200.0, 1270.0, "1234 ±35"),
        (0.0, 0.0, 0.0, "0"),
        (1.0, 1.0, 1.0, "1"),
        (None, None, None, "–"),
        (float("nan"), float("nan"), float("nan"), "–"),
        (0.5, None, None, "0.5000"),
        (8.0, None, None, "8"),
        (1e-7, None, None, "1e-07"),
        (123456.0, None, None, "1.23e+05"),
    ],
)
def test_a_cell(value: float | None, low: float | None, high: float | None, text: str) -> None:
    assert cell({"value": value, "ci_low": low, "ci_high": high}) == text


def test_saes_stand_before_controls_and_by_their_l0() -> None:
    rows = [
        row("zero", sae_recipe="control"),
        row("b/dense"),
        row("b/dense", "l0", 16.0),
        row("b/sparse"),
        row("b/sparse", "l0", 4.0),
        row("pca-4", sae_recipe="control"),
        row("pca-16", sae_recipe="control"),
        row("identity", sae_recipe="control"),
        row("b/x@random", sae_recipe="control"),
    ]
    assert ordered(rows) == (
        ["b/sparse", "b/dense"],
        ["identity", "pca-16", "pca-4", "zero", "b/x@random"],
    )


def test_arrows_and_short_names() -> None:
    text = printed([row("b/a"), row("b/a", "l0", 4.0)])
    assert "fvu ↓" in text
    assert "l0 " in text
    assert "\na " in text  # without the backbone, which is in the title


def test_every_place_has_a_table_of_its_own() -> None:
    text = printed([row("b/a"), row("b/c", tokens="cls"), row("d/a", backbone="d")])
    assert text.count("1,000 tokens") == 3


def test_variants_and_token_kinds_stay_out() -> None:
    text = printed([row("b/a", value=0.25), row("b/a", value=0.75, group="cls")])
    assert "0.2500" in text
    assert "0.7500" not in text


def test_a_task_that_no_board_knows_gets_its_first_metric() -> None:
    found = complete(["mine/first", "mine/second", "reconstruction/mse"], COLUMNS)
    assert found == ["mine/first"]


def test_a_long_name_of_a_control_breaks_where_it_reads_well() -> None:
    text = printed([row("b/matryoshka-batchtopk-k8@shuffled-decoder", sae_recipe="control")])
    assert "\nmatryoshka-batchtopk-k8" in text
    assert "\n  @shuffled-decoder" in text


def test_hostile_names_stay_text() -> None:
    text = printed([row("b/[red]x[/red]"), row("b/" + "long" * 30)])
    assert "[red]x[/red]" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_set_of_saes_stands_on_lines_of_its_own_within_80_columns() -> None:
    names = [f"b/a-rather-long-name-of-layer-{i}" for i in range(12)]
    sites = " + ".join(f"blocks.{i}" for i in range(12))
    tokens = " + ".join(["all"] * 12)
    lines = printed([row(" + ".join(names), site=sites, tokens=tokens)]).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("b on shapes · blocks.0 … blocks.11 (12 sites; all) · 10 images")
    assert lines[2].split() == ["a-rather-long-name-of-layer-0", "0.5000"]
    assert [line.split()[:2] for line in lines[3:14]] == [
        ["+", name.removeprefix("b/")] for name in names[1:]
    ]


def test_columns_without_room_are_left_out_from_the_last_on_and_named() -> None:
    rows = [
        row("b/one", metric, 0.5, task=task, ci_low=0.4, ci_high=0.6)
        for task, metric in [column.split("/") for column in COLUMNS] + [("late", "last_of_all")]
    ]
    wide, narrow = printed(rows, width=120), printed(rows, width=40)
    assert "last_of_all" in wide
    assert "no room" not in wide
    assert max(map(len, narrow.splitlines())) <= 40
    table, _, said = narrow.partition("no room for ")
    assert "last_of_all" not in table
    assert "last_of_all" in said
    assert "l0" in table  # the first is always there


def test_a_table_with_all_its_columns_is_whole_at_every_width() -> None:
    """What is left out is said, and nothing that is shown is cut."""
    metrics = [column.split("/") for column in COLUMNS]
    metrics += [("late", "probe_delta_frozen"), ("last", "dead_fraction")]
    rows = [
        row(sae, metric, 0.98, task=task, ci_low=0.9712, ci_high=0.9888, better="higher")
        for task, metric in metrics
        for sae in ("b/matryoshka-batchtopk-k8", "b/matryoshka-batchtopk-k8@shuffled-decoder")
    ]
    headings = ["l0 ↑", "fvu ↑", "Δ frozen ↑", "dead ↑"]
    for width in range(40, 110):
        text = printed(rows, width)
        table, _, said = text.partition("no room for ")
        assert all((name in table) != (name in said) for name in headings)
        assert max(map(len, table.splitlines())) <= width
        assert "…" not in table
        if "fvu ↑" in table:
            assert table.count("0.9800 ±0.0088") >= 2
    assert "no room" in printed(rows, 50)
    assert "no room" not in printed(rows, 109)


def test_few_shot_probes_stand_in_a_table_of_their_own() -> None:
    rows = [row("b/one", value=0.25)]
    rows += [row("b/one", value=0.75, variant="shots=5"), row("b/one", value=0.5, variant="k=3")]
    text = printed(rows)
    assert [line.endswith("shots=5") for line in text.splitlines() if "b on" in line] == [
        False,
        True,
    ]
    assert "0.7500" in text
    assert "0.5000" not in text


def test_the_place_of_a_set_names_each_site_once() -> None:
    assert place("blocks.1 + blocks.1", "cls + patches") == "blocks.1 (cls, patches)"
    assert place("a + b", "all + all") == "a + b (all)"
    assert place("blocks.1", "all") == "blocks.1 (all)"


def test_what_options_made_of_a_task_stands_in_a_table_of_its_own() -> None:
    rows = [
        row("b/one", "l0", 4.0),
        row("b/one", value=0.25, variant="replaced=cls"),
        row("b/one", value=0.75, variant="replaced=cls;temperature=1"),
        row("b/one", value=0.9, variant="convention=saev"),
    ]
    lines = printed(rows).splitlines()
    titles = [line for line in lines if line.startswith("b on shapes")]
    assert [line.endswith("replaced=cls") for line in titles] == [False, True]
    assert "0.2500" in printed(rows)
    assert not {"0.7500", "0.9000"} & set(printed(rows).split())


def test_a_default_leaves_no_room_for_variants() -> None:
    rows = [row("b/one", value=0.25), row("b/one", value=0.75, variant="tau=0.1")]
    assert "0.2500" in printed(rows)
    assert "tau" not in printed(rows)
