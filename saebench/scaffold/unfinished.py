"""An entry that `saebench new sae` wrote and that still asks: the same command completes it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saebench.errors import UsageError
from saebench.scaffold.asking import is_question


def header(name: str) -> str:
    """How the first line of every entry begins that `saebench new sae` writes."""
    return f"# Written by  saebench new sae {name} --from "


@dataclass(frozen=True)
class Unfinished:
    """An entry with open questions, and what was filled in since."""

    path: Path
    text: str
    format: str | None
    facts: Mapping[str, Any]  # of [semantics]

    @classmethod
    def at(cls, path: Path, name: str) -> Unfinished | None:
        """None where there is no entry, or one that is no longer its command's to write."""
        if not path.is_file():
            return None
        try:
            text = path.read_text(encoding="utf-8")
            said = tomllib.loads(text)
        except (OSError, ValueError):
            return None
        if not text.startswith(header(name)) or not any(map(is_question, text.splitlines())):
            return None
        facts = dict(said.get("semantics", {}))
        if "statistics" in facts:  # relative to the entry
            facts["statistics"] = str(path.parent / str(facts["statistics"]))
        return cls(path, text, said.get("format"), facts)

    def with_facts(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What is filled in, and what is given. Errors: UsageError where they differ."""
        for name, value in given.items():
            if self.facts.get(name, value) != value:
                raise UsageError(
                    f"{name} = {value!r} is given, and {self.path} says {self.facts[name]!r}",
                    "keep one, or change it there",
                )
        return {**self.facts, **given}

    def check_kept(self, text: str) -> None:
        """See that the completed text loses nothing that a person wrote. Errors: UsageError."""
        kept = set(text.splitlines())
        for line in self.text.splitlines()[1:]:
            written = is_question(line) or line.startswith("# l0 = ") or self._is_fact(line)
            if line.strip() and line not in kept and not written:
                raise UsageError(
                    f"{self.path} is there already, and would lose the line:   {line.strip()}",
                    "fill in there what it asks, or remove it and type the command again",
                )

    def _is_fact(self, line: str) -> bool:
        try:
            return self.facts.keys() >= tomllib.loads(line).keys() > set()
        except tomllib.TOMLDecodeError:
            return False
