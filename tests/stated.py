"""Checkpoints as an entry states them, and what was found out about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saebench.formats import read_sae
from saebench.saes import Sae
from saebench.specs import SaeSpec, WeightsSpec


def entry_of(path: Path, stated: str | None = None, **semantics: Any) -> SaeSpec:
    """An entry beside a weights file."""
    return SaeSpec(
        name="one",
        path=str(path.parent / "one.toml"),
        backbone="b",
        site="s",
        weights=WeightsSpec(file=path.name),
        format=stated,
        semantics=semantics,
    )


def read_stated(path: Path, stated: str | None = None, **semantics: Any) -> Sae:
    """The SAE as such an entry has it."""
    return read_sae(path, entry_of(path, stated, **semantics))


def facts_of(sae: Sae) -> dict[str, tuple[Any, str]]:
    """Fact -> (value, who says it)."""
    return {fact.name: (fact.value, fact.source) for fact in sae.record.facts}
