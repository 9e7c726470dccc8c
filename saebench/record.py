"""Where each fact that decides an SAE's forward pass came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fact:
    """One fact, and who says it.

    `source`: `format` (it is so in every file of the format), `file`, the name of a file beside it
    (`cfg.json`), `file name`, `entry`, `given` (to `load_sae`), or `estimated`.
    """

    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Record:
    """What an SAE was read from. `trained_on` is what its file says of its activations.

    `trained_on` may have the keys model, hook, tokens, dataset: in the words of its maker.
    """

    format: str = ""
    facts: tuple[Fact, ...] = ()
    notes: tuple[str, ...] = ()
    trained_on: Mapping[str, str] = field(default_factory=dict)

    @property
    def estimated(self) -> tuple[str, ...]:
        """The names of the facts that nobody stated: they were estimated from activations."""
        return tuple(fact.name for fact in self.facts if fact.source == "estimated")


def shown(record: Record) -> Iterator[str]:
    """A line a fact, with who says it; then what else a reader should know."""
    wide = max((len(fact.name) for fact in record.facts), default=0)
    values = [_as_toml(fact.value) for fact in record.facts]
    widest = max(map(len, values), default=0)
    for fact, value in zip(record.facts, values, strict=True):
        yield f"  {fact.name:<{wide}} = {value:<{widest}}   ({fact.source})"
    if record.trained_on:
        said = ", ".join(f"{key} {words}" for key, words in record.trained_on.items())
        yield f"  trained on: {said}"
    yield from (f"  note: {note}" for note in record.notes)


def _as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
