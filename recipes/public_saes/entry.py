"""One published SAE: what its makers say of it, what nobody says, and both as TOML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from saebench.formats.facts import Missing
from saebench.scaffold.asking import question
from saebench.scaffold.toml import comments, setting

COMMAND = "python -m recipes.public_saes"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of the registry, and what its page says of it beside.

    name: BACKBONE/NAME. series: a glob of names, one row of docs/public_saes.md. s: latents.
    weights: the fields of [weights], in their order. beside: configurations in the folder of the
    weights. note: what a reader should know, above the entry. unknown: key -> why it is open, for
    what makers do not say or could not be looked up. asked: facts that nobody says and without
    which the file is not read.
    """

    name: str
    series: str
    site: str
    tokens: str
    architecture: str
    s: int | None
    recipe: str
    description: str
    paper: str
    weights: Mapping[str, str]
    beside: tuple[str, ...] = ()
    semantics: Mapping[str, float] = field(default_factory=dict)
    asked: tuple[Missing, ...] = ()
    trained_on: str = ""
    l0: float | None = None
    l0_note: str = ""
    licence: str = ""
    suite: str = "full"
    note: str = ""
    unknown: Mapping[str, str] = field(default_factory=dict)

    @property
    def backbone(self) -> str:
        return self.name.partition("/")[0]

    @property
    def to_settle(self) -> tuple[str, ...]:
        """What has to be settled before the SAE can be read."""
        blocking = [key for key in ("filename", "configuration") if key in self.unknown]
        local = ["get the file"] if "file" in self.weights else []
        return (*local, *blocking, *(one.name for one in self.asked))


def toml(entry: Entry) -> str:
    """The text of the entry's file."""
    lines = [
        f"# Written by  {COMMAND}",
        *comments(entry.note),
        setting("backbone", entry.backbone),
        setting("site", entry.site),
        setting("tokens", entry.tokens),
        setting("architecture", entry.architecture),
        setting("recipe", entry.recipe),
        *_said("trained_on", entry.trained_on, entry),
    ]
    if entry.l0 is not None:
        lines.append(setting("l0", entry.l0, entry.l0_note))
    lines += [
        setting("suite", entry.suite),
        setting("description", entry.description),
        *_said("licence", entry.licence, entry),
        setting("paper", entry.paper),
        "",
        "[weights]",
        *(setting(key, value) for key, value in entry.weights.items()),
        *_open(("filename", "configuration"), entry),
    ]
    if "hub" in entry.weights:
        lines.append("# not known: revision, sha256 (locked at first use)")
    else:
        lines.append("# not known: sha256")
    if entry.beside:
        lines += ["", "[weights.beside]", *(setting(name, "") for name in entry.beside)]
    if entry.semantics or entry.asked:
        lines += ["", "[semantics]"]
        lines += [setting(name, value) for name, value in entry.semantics.items()]
        lines += [question(one) for one in entry.asked]
    return "\n".join(lines) + "\n"


def _said(key: str, value: str, entry: Entry) -> list[str]:
    return [setting(key, value)] if value else _open((key,), entry)


def _open(keys: Iterable[str], entry: Entry) -> list[str]:
    return [f"# not known: {key} ({entry.unknown[key]})" for key in keys if key in entry.unknown]


def scaling(about: str, estimate: str = "") -> Missing:
    """That nobody says how x was scaled. `estimate`: what `saebench estimate` can do about it."""
    how = f" (saebench estimate finds it: {estimate})" if estimate else ""
    choices = f'"raw", or input_mean = … and input_std = …{how}'
    return Missing("input", f"not known, {about}", choices)
