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
from saebench.weights import file_sha256

__all__ = ["FORMATS", "read_sae", "write_sae"]

FORMATS: tuple[ModuleType, ...] = (native,)


def read_sae(path: Path, spec: SaeSpec | None = None) -> Sae:
    """Read an SAE of any known format, float32 on the CPU.

    With a `spec`, its sha256 is checked before anything is parsed, its `format` and `semantics`
    are held to. Errors: WeightsError (missing, altered, truncated, not weights, NaN), SpecError.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is not there", "check  weights.file  in the entry")
    if spec and spec.weights.sha256 and (found := file_sha256(path)) != spec.weights.sha256:
        raise WeightsError(
            f"{path} has sha256 {found[:16]}…, and {spec.path or spec.name} declares "
            f"{spec.weights.sha256[:16]}…",
            "it was altered or only partly downloaded: restore it, "
            "or correct sha256 in the entry if the change is meant",
        )
    content = sniff(path)
    semantics: Mapping[str, object] = spec.semantics if spec else {}
    try:
        return _format_of(content, spec).read(content, semantics)
    except (SpecError, WeightsError) as error:
        if str(path) in error.what:
            raise
        raise type(error)(f"{path}: {error.what}", error.hint) from None


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
