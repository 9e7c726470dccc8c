"""Where each fact that decides an SAE's forward pass came from."""

from __future__ import annotations

from collections.abc import Mapping
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
