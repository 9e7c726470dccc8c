"""TOML as `saebench new` writes it: a key, its value, and a comment where it says something."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

COMMENT_AT = 32


def setting(name: str, value: Any, comment: str = "") -> str:
    """`name = value`, and perhaps a comment at a fixed column."""
    written = f"{bare(name)} = {literal(value)}"
    return commented(written, comment) if comment else written


def commented(written: str, comment: str) -> str:
    return f"{written:<{COMMENT_AT - 1}} # {comment}"


def comments(text: str | None) -> list[str]:
    return [f"# {line}" for line in text.splitlines()] if text else []


def literal(value: Any) -> str:
    """A value: text, numbers, true and false, lists and tables of them."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{bare(str(name))} = {literal(item)}" for name, item in value.items())
        return f"{{ {inside} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a basic string of TOML is one of JSON
    return json.dumps(value)


def bare(name: str) -> str:
    """A key, quoted where it has to be."""
    plain = name.replace("_", "").replace("-", "").isalnum() and name.isascii()
    return name if plain else json.dumps(name)
