"""docs/conventions.md lists exactly the formulas that there are."""

from __future__ import annotations

import pytest

from saebench.metrics.conventions import DEAD, RECONSTRUCTION, SPARSITY
from saebench.metrics.substitution_conventions import CONVENTIONS
from saebench.paths import CONTENT

PAGE = CONTENT / "docs" / "conventions.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="the docs are not part of a wheel")
def test_the_page_lists_every_formula() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    listed = [
        (row[0].strip("|` "), project) for row in rows for project in row[1].strip().split(", ")
    ]
    known = {*RECONSTRUCTION, *SPARSITY, ("normalized_freq", "saebench"), *CONVENTIONS}
    assert sorted(listed) == sorted(known | {("dead_fraction", project) for project in DEAD})
