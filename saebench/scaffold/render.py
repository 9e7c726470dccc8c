"""A backbone's entry as TOML with comments: what it says, and what may be left to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from saebench.scaffold.toml import bare, commented, comments, literal, setting
from saebench.specs import BackboneSpec, InputSpec, SiteSpec

_BASE = "the backbone that this one is a fine-tune of"


def render(spec: BackboneSpec, source: str, notes: Mapping[str, str] | None = None) -> str:
    """The text of an entry that reads as `spec`.

    source: where it comes from, for its first line. notes: table -> comments above it.
    """
    notes = notes or {}
    lines = [
        f"# Written by  saebench new backbone {spec.name} --from {source}",
        *comments(notes.get("")),
        setting("family", spec.family, "leaderboards group by these four"),
        setting("architecture", spec.architecture),
        setting("pretraining", spec.pretraining),
        setting("corpus", spec.corpus),
        setting("loader", spec.loader),
        setting("model", spec.model),
    ]
    if spec.model_args:
        lines.append(setting("model_args", spec.model_args))
    if spec.activation is None:
        lines.append("# activation: the model has more than one kind, so it is not checked")
    else:
        lines.append(setting("activation", spec.activation, "checked on the model"))
    if spec.text_activation is not None:
        lines.append(setting("text_activation", spec.text_activation, "of its text tower, as well"))
    lines += [
        setting("site", spec.site, "for controls, where no SAE asks for another"),
        setting("dataset", spec.dataset, "to measure on, where no --dataset is named"),
    ]
    if spec.base is not None:
        lines.append(setting("base", spec.base, _BASE))
    else:
        lines.append(commented('# base = "…"', _BASE))
    lines += [
        setting("description", spec.description),
        setting("licence", spec.licence),
        setting("paper", spec.paper),
        "",
        "[weights]",
        *comments(notes.get("weights")),
        *_weights(spec),
        "",
        "# The weights' own pixels: resize, centre crop, 0..1, minus mean, over std.",
        *comments(notes.get("input")),
        "[input]",
        *_input(spec.input),
        "",
        "# Literal module paths, each with its tokens in the order they stand in.",
        "[sites]",
        *(f"{bare(name)} = {_site(site)}" for name, site in spec.sites.items()),
        "",
        "[head]",
        *comments(notes.get("head")),
        setting("kind", spec.head.kind, _HEADS[spec.head.kind]),
    ]
    if spec.head.classes:
        lines.append(setting("classes", spec.head.classes, "first output, and how many"))
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
        if getattr(spec.weights, field.name)
    }
    lines = [setting(key, value) for key, value in written.items()]
    if "hub" in written and "sha256" not in written:
        lines.append("# What is left open (revision, file name, sha256) is locked at first use.")
    return lines


def _input(spec: InputSpec) -> list[str]:
    lines = [setting("size", spec.size), setting("resize", spec.resize)]
    if spec.resize_to is not None:
        lines.append(setting("resize_to", spec.resize_to))
    return [
        *lines,
        setting("interpolation", spec.interpolation),
        setting("crop", spec.crop),
        setting("mean", spec.mean),
        setting("std", spec.std),
    ]


_SITE = ("path", "side", "kind", "layout", "width", "cls", "distillation", "registers", "grid")


def _site(site: SiteSpec) -> str:
    unsaid = {field.name: field.default for field in fields(site)}
    said = {name: getattr(site, name) for name in _SITE}
    return literal({name: value for name, value in said.items() if value != unsaid[name]})
