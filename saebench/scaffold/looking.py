"""Reads a checkpoint as far as it says what it is, and asks for what it does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saebench.errors import SpecError, WeightsError
from saebench.formats import FORMATS, format_of, possible_formats, read_content
from saebench.formats.content import Content
from saebench.formats.facts import Facts, Missing, MissingFacts
from saebench.formats.statistics import read_statistics
from saebench.record import Record
from saebench.saes import Sae
from saebench.scaffold.asking import Ask, answers


@dataclass
class Looked:
    """What is known of a file after it was read as far as possible."""

    format: str = ""
    stated: bool = False  # the file alone does not tell its format
    given: dict[str, Any] = field(default_factory=dict)
    sae: Sae | None = None
    record: Record = Record()
    missing: tuple[Missing, ...] = ()


def look(content: Content, stated: str | None, given: dict[str, Any], ask: Ask | None) -> Looked:
    """Read the file, and ask for what is missing until it can be read or nothing is answered."""
    looked = Looked(given=given)
    if stated is None:
        try:
            looked.format = format_of(content).NAME
        except WeightsError:
            if not (choices := possible_formats(content)):
                raise
            question = Missing(
                "format",
                "several formats have such a file, and read it otherwise",
                " | ".join(f'"{choice}"' for choice in choices),
            )
            stated = str(answers([question], ask).get("format", "")) if ask else ""
            if not stated:
                looked.missing = (question,)
                return looked
    if stated is not None:
        looked.format = format_of(content, stated).NAME
        looked.stated = not FORMATS[looked.format].recognise(content)
    while True:
        facts = _facts(looked.given)
        try:
            looked.sae = read_content(content, facts, stated)
            looked.record, looked.missing = looked.sae.record, ()
            return looked
        except MissingFacts as error:
            looked.record, looked.missing = facts.record(looked.format), error.missing
        if ask is None or not (said := _answered(content, looked, stated, ask)):
            return looked
        looked.given |= said


def _answered(content: Content, looked: Looked, stated: str | None, ask: Ask) -> dict[str, Any]:
    """Answers that can be: one that cannot is asked for again, with the reason."""
    left = list(looked.missing)
    while said := answers(left, ask):
        try:
            read_content(content, _facts({**looked.given, **said}), stated)
        except MissingFacts:
            return said
        except SpecError as error:
            ask(f"{error}\n(Enter asks again) ")
            continue
        return said
    return {}


def _facts(given: Mapping[str, Any]) -> Facts:
    stated = {name: value for name, value in given.items() if name != "statistics"}
    file = given.get("statistics")
    estimated = read_statistics(Path(str(file))) if file is not None else {}
    return Facts(stated, giver="entry", estimated=estimated)
