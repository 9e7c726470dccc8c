"""Reads entries strictly: no unknown key, no value of another type, no coercion.

An error names the file, the key and the nearest valid key. pydantic is used here, at the edge, and
nowhere inside.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from saebench.errors import SpecError
from saebench.specs import (
    BackboneSpec,
    BoardSpec,
    DatasetSpec,
    FolderForm,
    HeadSpec,
    HubForm,
    InputSpec,
    SaeSpec,
    SiteSpec,
    TarForm,
    WeightsSpec,
)

NESTED: dict[str, type] = {
    "weights": WeightsSpec,
    "input": InputSpec,
    "sites": SiteSpec,
    "head": HeadSpec,
    "folder": FolderForm,
    "tar": TarForm,
    "hub": HubForm,
}
"""The tables of an entry, and what they hold."""

Spec = TypeVar("Spec", BackboneSpec, SaeSpec, DatasetSpec, BoardSpec)


def read_spec(kind: type[Spec], path: Path, name: str) -> Spec:
    """Read one entry. Errors: SpecError naming the file, the key and the nearest valid key."""
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path} is not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from None
    return parse_spec(kind, raw, name=name, path=str(path))


def parse_spec(kind: type[Spec], raw: Mapping[str, Any], *, name: str, path: str) -> Spec:
    """Check a mapping strictly against a spec. `name` and `path` are not keys of the file."""
    for reserved in ("name", "path"):
        if reserved in raw:
            raise SpecError(
                f"{path}: the key '{reserved}' is not written in an entry",
                "an entry's name is its file's path below the registry folder; remove the line",
            )
    return validated(kind, {**raw, "name": name, "path": path}, where=path)


Any_ = TypeVar("Any_")


def validated(kind: type[Any_], values: Mapping[str, Any], *, where: str) -> Any_:
    """`values` as a `kind`, strictly: no unknown key, no coercion between types."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(_json(values, where), strict=True)
    except ValidationError as error:
        raise SpecError(*_explain(kind, error, where)) from None


def _json(values: Mapping[str, Any], where: str) -> str:
    # Through JSON, because that is where strict mode takes a list for a tuple, as TOML writes it.
    import json

    try:
        return json.dumps(values, allow_nan=False)
    except TypeError as error:
        raise SpecError(
            f"{where}: {error}", "use text, numbers, true and false, lists and tables"
        ) from None
    except ValueError:
        raise SpecError(f"{where}: NaN and infinity have no place in an entry") from None


@cache
def _adapter(kind: type) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    for cls in (*NESTED.values(), kind):
        setattr(cls, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010
    return TypeAdapter(kind)


def _explain(kind: type, error: Any, where: str) -> tuple[str, str]:
    problems, hint = [], ""
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = _keys_at(kind, item["loc"][:-1])
            near = get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
            problems.append(f"{where}: unknown key '{key}'")
            hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(known)}"
        elif item["type"] in ("missing", "missing_argument"):
            problems.append(f"{where}: the key '{key}' is missing")
        else:
            problems.append(f"{where}: '{key}': {item['msg']}, got {item['input']!r}")
    return "\n".join(problems), hint


def _keys_at(kind: type, loc: tuple[Any, ...]) -> list[str]:
    """The valid keys of the (possibly nested) spec that an error location points into."""
    if loc and loc[0] in NESTED:
        kind = NESTED[str(loc[0])]
    return [f.name for f in dataclasses.fields(kind) if f.name not in ("name", "path")]
