"""A backbone's entry as TOML with comments: what it says, and what may be left to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from saebench.specs import BackboneSpec, InputSpec, SiteSpec

_COMMENT_AT = 32
_BASE = "the backbone that this one is a fine-tune of"


def render(spec: BackboneSpec, source: str, notes: Mapping[str, str] | None = None) -> str:
    """The text of an entry that reads as `spec`.

    source: where it comes from, for its first line. notes: table -> comments above it.
    """
    notes = notes or {}
    lines = [
        f"# Written by  saebench new backbone {spec.name} --from {source}",
        *_comments(notes.get("")),
        _line("family", spec.family, "leaderboards group by these four"),
        _line("architecture", spec.architecture),
        _line("pretraining", spec.pretraining),
        _line("corpus", spec.corpus),
        _line("loader", spec.loader),
        _line("model", spec.model),
    ]
    if spec.model_args:
        lines.append(_line("model_args", spec.model_args))
    if spec.activation is None:
        lines.append("# activation: the model has more than one kind, so it is not checked")
    else:
        lines.append(_line("activation", spec.activation, "checked on the model"))
    if spec.text_activation is not None:
        lines.append(_line("text_activation", spec.text_activation, "of its text tower, as well"))
    lines += [
        _line("site", spec.site, "for controls, where no SAE asks for another"),
        _line("dataset", spec.dataset, "to measure on, where no --dataset is named"),
    ]
    if spec.base is not None:
        lines.append(_line("base", spec.base, _BASE))
    else:
        lines.append(_commented('# base = "…"', _BASE))
    lines += [
        _line("description", spec.description),
        _line("licence", spec.licence),
        _line("paper", spec.paper),
        "",
        "[weights]",
        *_comments(notes.get("weights")),
        *_weights(spec),
        "",
        "# The weights' own pixels: resize, centre crop, 0..1, minus mean, over std.",
        *_comments(notes.get("input")),
        "[input]",
        *_input(spec.input),
        "",
        "# Literal module paths, each with its tokens in the order they stand in.",
        "[sites]",
        *(f"{_key(name)} = {_site(site)}" for name, site in spec.sites.items()),
        "",
        "[head]",
        *_comments(notes.get("head")),
        _line("kind", spec.head.kind, _HEADS[spec.head.kind]),
    ]
    if spec.head.classes:
        lines.append(_line("classes", spec.head.classes, "first output, and how many"))
    elif spec.head.kind == "classifier" and "head" not in notes:
        lines.append(
            "# classes = { my-dataset = [0, 10] }   the first output that is its, and how many"
        )
    return "\n".join(lines) + "\n"


_HEADS = {
    "classifier": "its own classes",
    "zero_shot": "class names through its text tower; the dataset has templates",
    "none": "a probe is fitted",
}


def _weights(spec: BackboneSpec) -> list[str]:
    written = {
        field.name: getattr(spec.weights, field.name)
        for field in fields(spec.weights)
        if getattr(spec.weights, field.name) is not None
    }
    lines = [_line(key, value) for key, value in written.items()]
    if "hub" in written and "sha256" not in written:
        lines.append("# What is left open (revision, file name, sha256) is locked at first use.")
    return lines


def _input(spec: InputSpec) -> list[str]:
    lines = [_line("size", spec.size), _line("resize", spec.resize)]
    if spec.resize_to is not None:
        lines.append(_line("resize_to", spec.resize_to))
    return [
        *lines,
        _line("interpolation", spec.interpolation),
        _line("crop", spec.crop),
        _line("mean", spec.mean),
        _line("std", spec.std),
    ]


_SITE = ("path", "side", "kind", "layout", "width", "cls", "distillation", "registers", "grid")


def _site(site: SiteSpec) -> str:
    unsaid = {field.name: field.default for field in fields(site)}
    said = {name: getattr(site, name) for name in _SITE}
    return _value({name: value for name, value in said.items() if value != unsaid[name]})


def _line(key: str, value: Any, comment: str = "") -> str:
    line = f"{key} = {_value(value)}"
    return _commented(line, comment) if comment else line


def _commented(line: str, comment: str) -> str:
    return f"{line:<{_COMMENT_AT - 1}} # {comment}"


def _comments(text: str | None) -> list[str]:
    return [f"# {line}" for line in text.splitlines()] if text else []


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(str(key))} = {_value(item)}" for key, item in value.items())
        return f"{{ {inside} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a basic string of TOML is one of JSON
    return json.dumps(value)


def _key(name: str) -> str:
    plain = name.replace("_", "").replace("-", "").isalnum() and name.isascii()
    return name if plain else json.dumps(name)
