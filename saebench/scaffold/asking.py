"""Facts that nobody says yet: asked of whoever sits at the terminal, or listed for later."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from saebench.errors import UsageError
from saebench.formats.facts import Missing

Ask = Callable[[str], str]  # shows a question, gives the answer: `input`

NOTHING = "(an empty answer leaves it open)"


def parse_facts(texts: Iterable[str]) -> dict[str, Any]:
    """Several of `parse_fact`. Errors: UsageError, also for a fact that is there twice."""
    found: dict[str, Any] = {}
    for name, value in map(parse_fact, texts):
        if name in found:
            raise UsageError(f"{name} is typed twice: {found[name]!r} and {value!r}", "keep one")
        found[name] = value
    return found


def parse_fact(text: str) -> tuple[str, Any]:
    """`k=32`, as it is typed behind --set. Errors: UsageError."""
    name, equals, written = text.partition("=")
    if not equals or not re.fullmatch(r"\w+", name.strip()) or not written.strip():
        raise UsageError(f"--set {text}: a fact is written  NAME=VALUE", "--set k=32")
    return name.strip(), parse_value(written)


def parse_value(written: str) -> Any:
    """A value as TOML writes it; what is none is text, so that nobody has to quote a word."""
    written = written.strip()
    try:
        return tomllib.loads(f"x = {written}")["x"]
    except (tomllib.TOMLDecodeError, KeyError):
        return written


def answers(missing: Sequence[Missing], ask: Ask) -> dict[str, Any]:
    """What is answered. One answer may hold several facts:  input_mean = 0.1, input_std = 2"""
    found: dict[str, Any] = {}
    for one in missing:
        typed = ask(f"{one.name}: {one.about}\n  {one.choices}   {NOTHING}\n{one.name} = ").strip()
        if not typed:
            continue
        if named := parse_facts(_several(typed)):
            found |= named
        else:
            found[one.name] = parse_value(typed)
    return found


def _several(typed: str) -> Iterator[str]:
    """The facts of `a = 1, b = [2, 3]`; nothing for a plain value."""
    starts = [match.start() for match in re.finditer(r"(?:^|(?<=[\s,;]))\w+\s*=", typed)]
    for start, stop in pairwise([*starts, len(typed)]):
        yield typed[start:stop].strip().removesuffix("and").strip(" ,;")


def question(missing: Missing) -> str:
    """A fact as it stands in an entry while nobody says it: a comment to fill in."""
    return f"{_begun(missing.name)}{missing.about}; {missing.choices}"


def _begun(name: str) -> str:
    return f"# {name} = …   # asked: "


def is_question(line: str) -> bool:
    """Whether a line of an entry is a `question`."""
    return re.match(_begun(r"\w+"), line) is not None


def without_questions(text: str, answered: Iterable[str]) -> str:
    """An entry's text without the questions about these facts."""
    begun = tuple(map(_begun, answered))
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(begun))


def from_terminal(prompt: str) -> str:
    """`input`, with nothing for an answer where the input ends."""
    try:
        return input(prompt)
    except EOFError:
        print()
        return ""


def listed(missing: Sequence[Missing]) -> Iterator[str]:
    """Two lines a fact: what it is about, and what may be written."""
    wide = max((len(one.name) for one in missing), default=0)
    for one in missing:
        yield f"  {one.name:<{wide}}   {one.about}"
        yield f"  {'':<{wide}}   {one.choices}"
