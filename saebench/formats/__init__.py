"""Checkpoint formats: a file is recognised by its content and turned into an `Sae`.

One module a format, with

    NAME                        as entries write it
    recognise(content) -> bool  whether a file is this, and nothing else
    could_be(content) -> bool   optional: whether it can be read as this, when somebody says so
    read(content, facts) -> Sae

and a line in `FORMATS`. Formats never overlap: a file that two could have written is recognised by
none of them, and `format` in the entry decides between those that say `could_be`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

from saebench.beside import beside_paths, statistics_path
from saebench.errors import SpecError, WeightsError
from saebench.formats.content import Content, sniff
from saebench.formats.decoder_norm import DECODER_NORM, say_decoder_norm
from saebench.formats.facts import Facts, MissingFacts
from saebench.formats.statistics import read_statistics
from saebench.formats.writing import write_sae
from saebench.saes import Sae
from saebench.specs import SaeSpec
from saebench.weights import verified_path

__all__ = [
    "FORMATS",
    "facts_of",
    "format_of",
    "possible_formats",
    "read_content",
    "read_entry",
    "read_sae",
    "write_sae",
]

_MODULES = (
    "clipscope",
    "dictionary_learning",
    "discover_then_name",
    "gemma_scope",
    "goodfire",
    "llama_scope",
    "mlsae",
    "monoloss",
    "msae",
    "native",
    "openai",
    "overcomplete",
    "patchsae",
    "prisma",
    "saeco",
    "saelens",
    "saev",
    "sparc",
    "sparsify",
    "universal_sae",
    "visaebench",
)

FORMATS: Mapping[str, ModuleType] = {
    module.NAME: module
    for module in (import_module(f"saebench.formats.{name}") for name in _MODULES)
}
"""Every format that is read, by its name."""


def read_sae(path: Path, spec: SaeSpec | None = None, facts: Facts | None = None) -> Sae:
    """Read an SAE of any known format, float32 on the CPU.

    With a `spec`, its `format`, its side files, and the `facts_of` it hold, or those given.
    `read_entry` finds an entry's file and checks its sha256 first.
    Errors: WeightsError (truncated, not weights, NaN), SpecError (facts that are missing or wrong).
    """
    if spec is None:
        return read_content(sniff(path), facts or Facts())
    return read_content(sniff(path, beside_paths(spec, path)), facts or facts_of(spec), spec.format)


def facts_of(spec: SaeSpec) -> Facts:
    """What an entry and its statistics file say. Errors: SpecError, WeightsError."""
    statistics = statistics_path(spec)
    given = {name: value for name, value in spec.semantics.items() if name != "statistics"}
    estimated = read_statistics(statistics) if statistics else {}
    return Facts(given, giver="entry", estimated=estimated)


def read_entry(spec: SaeSpec, facts: Facts | None = None) -> Sae:
    """The SAE of an entry, its bytes those that the entry declares before anything is parsed.

    `facts`: those of the entry, and more. Errors: as `read_sae`; WeightsError (missing, altered).
    """
    path = verified_path(spec)
    if path is None:
        raise SpecError(f"{spec.path or spec.name}: there are no weights", '[weights]  file = "…"')
    try:
        return read_sae(path, spec, facts)
    except MissingFacts as error:
        error.what = f"{spec.path or spec.name}: {error.what}"
        raise


def read_content(content: Content, facts: Facts, name: str | None = None) -> Sae:
    """Read what was sniffed, as the format `name`, or as what it is. Errors: as `read_sae`."""
    module = format_of(content, name)
    facts.later(DECODER_NORM)
    try:
        sae = module.read(content, facts)
        say_decoder_norm(sae, facts)
    except MissingFacts as error:
        error.what = f"{content.path} ({module.NAME}): {error.what}"
        raise
    except (SpecError, WeightsError) as error:
        if str(content.path) in error.what:
            raise
        hint = error.hint or f"the file is damaged, or not as those of '{module.NAME}' are"
        raise type(error)(f"{content.path} ({module.NAME}): {error.what}", hint) from None
    return sae.recorded(facts.record(module.NAME))


def format_of(content: Content, name: str | None = None) -> ModuleType:
    """The format of a file, and whether it is the stated one.

    Errors: SpecError (a format that is not known, or is not this file's), WeightsError (none).
    """
    if name and name not in FORMATS:
        raise SpecError(
            f"format = '{name}' is not one that is read", f"known: {', '.join(FORMATS)}"
        )
    found = next((module for module in FORMATS.values() if module.recognise(content)), None)
    if name is None:
        if found is None:
            raise _unrecognised(content)
        return found
    stated = FORMATS[name]
    if found not in (None, stated):
        raise SpecError(
            f"format = '{name}' is stated, and {content.path} is '{found.NAME}' by its content",
            "correct or remove  format",
        )
    if found is None and not _could_be(stated, content):
        raise SpecError(
            f"format = '{name}' is stated, and {content.path} is not of that format: it holds "
            f"{_names(content)}",
            "correct or remove  format",
        )
    return stated


def possible_formats(content: Content) -> list[str]:
    """The formats that a file can be read as when somebody says which, and it is none for sure."""
    return [name for name, module in FORMATS.items() if _could_be(module, content)]


def _could_be(module: ModuleType, content: Content) -> bool:
    return hasattr(module, "could_be") and module.could_be(content)


def _unrecognised(content: Content) -> WeightsError:
    if possible := possible_formats(content):
        return WeightsError(
            f"{content.path} could be of several formats, which read the same names otherwise: "
            f"{', '.join(possible)}",
            f"say which:   format = '{possible[0]}'   (its configuration file may be missing)",
        )
    return WeightsError(
        f"{content.path} is of no known SAE format; it holds: {_names(content)}",
        f"known: {', '.join(FORMATS)}; a format is one file in saebench/formats",
    )


def _names(content: Content) -> str:
    names = sorted(content.names)
    return (", ".join(names[:12]) + (", …" if len(names) > 12 else "")) or "nothing"
