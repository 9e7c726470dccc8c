"""Changes one key of an entry's text and leaves all else, comments included, as a person wrote it.

What comes is read again: it says what the old text said, with that one key changed, or nothing is
changed at all.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from saebench.errors import SpecError

_HEADER = re.compile(r"\s*\[")


def with_key(text: str, table: str, key: str, value: str, *, where: str) -> str:
    """The text with  key = "value"  in a table ("": the top), replaced or added.

    where: the file, for messages. Errors: SpecError for a text in which that cannot be done.
    """
    wanted: dict[str, Any] = tomllib.loads(text)
    of_table = wanted.setdefault(table, {}) if table else wanted
    written = f"{key} = {json.dumps(value, ensure_ascii=False)}"
    if isinstance(of_table, dict):
        of_table[key] = value
        for changed in _candidates(text, table, key, written):
            if _parsed(changed) == wanted:
                return changed
    raise SpecError(
        f"{where}: {key} cannot be written into it without changing more",
        f"write it yourself:   {f'[{table}]  ' if table else ''}{written}",
    )


def _candidates(text: str, table: str, key: str, written: str) -> list[str]:
    lines = text.splitlines()
    first, stop = _region(lines, table)
    if first is None:
        end = [] if not lines or not lines[-1].strip() else [""]
        return [_joined([*lines, *end, f"[{table}]", written])]
    there = [i for i in range(first, stop) if re.match(rf'\s*"?{re.escape(key)}"?\s*=', lines[i])]
    if there:
        return [_joined([*lines[:i], written, *lines[i + 1 :]]) for i in there]
    # At the top: above the first key, below what is said of the whole entry.
    while not table and first < stop and (not lines[first].strip() or lines[first][0] == "#"):
        first += 1
    return [_joined([*lines[:first], written, *lines[first:]])]


def _region(lines: list[str], table: str) -> tuple[int | None, int]:
    """The lines of a table, without its header; None where it has none."""
    headers = [i for i, line in enumerate(lines) if _HEADER.match(line)]
    first: int | None = 0
    if table:
        own = re.compile(rf"\s*\[\s*{re.escape(table)}\s*\]")
        first = next((i + 1 for i in headers if own.match(lines[i])), None)
    return first, next((i for i in headers if first is not None and i >= first), len(lines))


def _joined(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"


def _parsed(text: str) -> Mapping[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None
