"""Checkpoint formats: a file is recognised by its content and turned into an `Sae`.

One module a format, each with `NAME`, `recognise(content) -> bool` and `read(content, semantics)
-> Sae`. A format comes in by its line in `FORMATS`; the first that recognises a file reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from saebench.errors import SpecError, WeightsError
from saebench.formats import native
from saebench.formats.content import Content, sniff
from saebench.formats.native import write_sae
from saebench.saes import Sae
from saebench.specs import SaeSpec
from saebench.weights import verified_path

__all__ = ["FORMATS", "read_entry", "read_sae", "write_sae"]

FORMATS: tuple[ModuleType, ...] = (native,)


def read_sae(path: Path, spec: SaeSpec | None = None) -> Sae:
    """Read an SAE of any known format, float32 on the CPU.

    With a `spec`, its `format` and `semantics` are held to. `read_entry` finds an entry's file and
    checks its sha256 first. Errors: WeightsError (truncated, not weights, NaN), SpecError.
    """
    content = sniff(path)
    semantics: Mapping[str, object] = spec.semantics if spec else {}
    try:
        return _format_of(content, spec).read(content, semantics)
    except (SpecError, WeightsError) as error:
        if str(path) in error.what:
            raise
        raise type(error)(f"{path}: {error.what}", error.hint) from None


def read_entry(spec: SaeSpec) -> Sae:
    """The SAE of an entry, its bytes those that the entry declares before anything is parsed.

    Errors: as `read_sae`; WeightsError (missing, altered).
    """
    path = verified_path(spec)
    if path is None:
        raise SpecError(f"{spec.path or spec.name}: there are no weights", '[weights]  file = "…"')
    return read_sae(path, spec)


def _format_of(content: Content, spec: SaeSpec | None) -> ModuleType:
    known = {module.NAME: module for module in FORMATS}
    if spec and spec.format and spec.format not in known:
        raise SpecError(
            f"{spec.path or spec.name}: format = '{spec.format}' is not one that is read",
            f"known: {', '.join(known)}",
        )
    found = next((module for module in FORMATS if module.recognise(content)), None)
    if found is None:
        names = content.names
        shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
        raise WeightsError(
            f"{content.path} is of no known SAE format; it holds: {shown or 'nothing'}",
            f"known: {', '.join(known)}; a format is one file in saebench/formats",
        )
    if spec and spec.format and spec.format != found.NAME:
        raise SpecError(
            f"{spec.path or spec.name} says format = '{spec.format}', and {content.path} is "
            f"'{found.NAME}' by its content",
            "correct or remove  format",
        )
    return found
