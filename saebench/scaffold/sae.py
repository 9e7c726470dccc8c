"""The entry of an SAE, of any checkpoint: what its file says, and what has to be said of it.

The file is read as a run would read it, so an entry that is complete can be measured. What nobody
says yet stands in the entry as a comment to fill in, by hand or by the same command with --set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saebench.address import Checkpoint, locate
from saebench.atomic import check_folder, make_folder, write_bytes
from saebench.coders import chain_of, check_fit, on_decoder
from saebench.errors import Mismatch, NotFound, UsageError
from saebench.formats import read_entry
from saebench.formats.content import sniff
from saebench.formats.facts import Missing
from saebench.identity import file_sha256
from saebench.loading import check_widths
from saebench.record import Record
from saebench.registry import Registry
from saebench.saes import Sae
from saebench.scaffold import FOLDERS, check_name, checked_path, entry_path, relative
from saebench.scaffold.asking import Ask, from_terminal, listed, parse_facts, question
from saebench.scaffold.looking import Looked, look
from saebench.scaffold.toml import commented, comments, setting
from saebench.scaffold.unfinished import Unfinished, header
from saebench.scaffold.words import choose_backbone, site_of, tokens_of
from saebench.specs import BackboneSpec, SaeSpec, SiteSpec, WeightsSpec
from saebench.whereabouts import is_here


@dataclass(frozen=True)
class NewSae:
    """An entry that was written. `missing`: what has to be filled in before it can be read."""

    path: Path
    spec: SaeSpec
    record: Record
    missing: tuple[Missing, ...] = ()


def new_sae(
    registry: Registry,
    name: str | None,
    source: str | None,
    *,
    out: str,
    backbone: str | None = None,
    site: str | None = None,
    tokens: str | None = None,
    format: str | None = None,
    semantics: Mapping[str, Any] | None = None,
    ask: Ask | None = None,
) -> NewSae:
    """Write the entry of the checkpoint at `source` (`saebench.address`) below the folder `out`.

    name, backbone, site, tokens: None takes what the file says, and else the backbone's own site
    and all tokens. semantics: facts that the file does not say. ask: of a person, for all others.
    An entry of this name that still asks is completed, with what stands in it.
    Errors: UsageError (a name that is taken or none, a backbone, site or tokens that have to be
    chosen); NotFound, Mismatch (backbone, site, width); SpecError (facts that contradict the file);
    WeightsError (no SAE); WriteError.
    """
    if source is None:
        raise UsageError(
            "an SAE is a checkpoint", "saebench new sae [NAME] --from FILE, FOLDER or hf-hub:…"
        )
    check_folder(Path(out) / FOLDERS["sae"])
    earlier = None if name is None else _place(registry, name, out)
    given = dict(semantics or {})
    checkpoint = locate(source, name or source)
    content = sniff(checkpoint.path, checkpoint.configurations)
    if earlier is not None:
        given, format = earlier.with_facts(given), format or earlier.format
    looked = look(content, format, given, ask)
    owner = _owner(registry, name, backbone, looked.record)
    if name is None:
        name = f"{owner.name}/{_plain(checkpoint.title)}"
        earlier = _place(registry, name, out)
        if earlier is not None:
            looked = look(content, format or earlier.format, earlier.with_facts(looked.given), ask)
    path = entry_path("sae", name, out)
    spec = _spec(registry, owner, name, path, checkpoint, looked, site, tokens)
    text = _text(spec, source, owner, looked)
    if earlier is not None:
        earlier.check_kept(text)
    make_folder(path.parent)
    write_bytes(path, text.encode())
    return NewSae(path, spec, looked.record, looked.missing)


def _place(registry: Registry, name: str, out: str) -> Unfinished | None:
    """The unfinished entry of this name; None where a new one can be. Errors: `checked_path`'s."""
    check_name("sae", name)
    path = entry_path("sae", name, out)
    check_folder(path.parent)
    if (earlier := Unfinished.at(path, name)) is None:
        checked_path(registry, "sae", name, out)
    return earlier


# --- the entry ----------------------------------------------------------------------------------


def _owner(
    registry: Registry, name: str | None, backbone: str | None, record: Record
) -> BackboneSpec:
    """The backbone: as given, else as the name says, else as the file says."""
    if backbone is not None:
        return registry.backbone(backbone)
    first = (name or "").partition("/")[0]
    if first in registry.backbones.files:
        return registry.backbone(first)
    try:
        return registry.backbone(choose_backbone(record.trained_on.get("model", ""), registry))
    except UsageError as error:
        if isinstance(error, NotFound) or not first or "/" not in (name or ""):
            raise
        raise UsageError(f"no backbone is called '{first}': {error.what}", error.hint) from None


def _plain(title: str) -> str:
    """A title as a part of an entry's name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", title).strip("-.") or "sae"


def _spec(
    registry: Registry,
    owner: BackboneSpec,
    name: str,
    path: Path,
    checkpoint: Checkpoint,
    looked: Looked,
    site: str | None,
    tokens: str | None,
) -> SaeSpec:
    said = looked.record.trained_on
    chosen = site or _said_site(said.get("hook", ""), owner)
    semantics = dict(looked.given)
    if "statistics" in semantics:
        semantics["statistics"] = relative(Path(str(semantics["statistics"])), path.parent)
    sae = looked.sae
    spec = SaeSpec(
        name=name,
        path=str(path),
        backbone=owner.name,
        site=chosen,
        tokens=tokens or "all",
        weights=_weights(checkpoint, path),
        format=looked.format if looked.stated else None,
        semantics=semantics,
        architecture=sae.architecture if sae else "",
        trained_on=said.get("dataset", ""),
    )
    if not on_decoder(spec):  # whose codes are those of both SAEs together
        spec = replace(spec, l0=_l0(looked))
    chain = chain_of(registry, spec)
    there = check_fit(owner, chain[-1])
    if len(chain) > 1 and sae is not None:
        _check_above(chain, sae, there)
    if len(chain) == 1:
        if tokens is None:
            spec = replace(spec, tokens=_said_tokens(said.get("tokens", ""), owner, chosen))
        if sae is not None and sae.d_model != there.width:
            fitting = [name for name, one in owner.sites.items() if one.width == sae.d_model]
            raise Mismatch(
                f"it reads {sae.d_model} dimensions, and the site '{chosen}' of '{owner.name}' "
                f"has {there.width}",
                f"--site {', '.join(fitting)}" if fitting else "is it of another backbone?",
            )
    return spec


def _check_above(chain: Sequence[SaeSpec], sae: Sae, site: SiteSpec) -> None:
    """The width of an SAE on an SAE, where those below are on this machine. Errors: Mismatch."""
    if all(map(is_here, chain[1:])):
        saes = {link.name: read_entry(link) for link in chain[1:]}
        check_widths(chain, {**saes, chain[0].name: sae}, site.width, chain[-1].site)


def _said_site(hook: str, owner: BackboneSpec) -> str:
    if not hook:
        return owner.site
    if found := site_of(hook, owner):
        return found
    raise UsageError(
        f"its file says that it was trained at '{hook}': which site of '{owner.name}' is that?",
        f"--site NAME   (there: {', '.join(owner.sites)})",
    )


def _said_tokens(words: str, owner: BackboneSpec, site: str) -> str:
    if not words:
        return "all"
    there = owner.sites[site]
    if found := tokens_of(words, there):
        return found
    raise UsageError(
        f"its file says of the tokens it was trained on '{words}': which are they?",
        f"--tokens KINDS   (all, or of {', '.join(there.kinds)}, joined by +)",
    )


def _weights(checkpoint: Checkpoint, path: Path) -> WeightsSpec:
    sha256 = file_sha256(checkpoint.path)
    beside = {name: file_sha256(file) for name, file in checkpoint.beside.items()}
    if checkpoint.repo:
        return WeightsSpec(
            hub=checkpoint.repo,
            revision=checkpoint.commit,
            filename=checkpoint.file,
            sha256=sha256,
            beside=beside,
        )
    file = relative(checkpoint.path, path.parent)
    return WeightsSpec(file=file, sha256=sha256, beside=beside)


def _l0(looked: Looked) -> float | None:
    """The L0 that the file fixes or aims at, where it says so."""
    aims = [fact.value for fact in looked.record.facts if fact.name == "k"]
    found = looked.sae.k if looked.sae and looked.sae.k else (aims[0] if aims else None)
    return float(found) if isinstance(found, (int, float)) and found > 0 else None


def _text(spec: SaeSpec, source: str, owner: BackboneSpec, looked: Looked) -> str:
    sites = ", ".join(owner.sites)
    kinds = ", ".join(owner.sites[spec.site].kinds) if spec.site in owner.sites else ""
    asked = {one.name: one for one in looked.missing}
    lines = [
        header(spec.name) + source,
        *_said(looked.record),
        setting("backbone", spec.backbone),
        setting("site", spec.site, f"of: {sites}"),
        setting("tokens", spec.tokens, f"all, or kinds joined by +: {kinds}"),
    ]
    if spec.format:
        lines.append(setting("format", spec.format, "the file alone does not tell"))
    if "format" in asked:
        lines.append(question(asked.pop("format")))
    if spec.architecture:
        lines.append(setting("architecture", spec.architecture))
    l0 = ("# l0 = 16", "as measured") if spec.l0 is None else (f"l0 = {spec.l0:g}", "its k")
    lines += [
        "",
        "# Documentation, and how leaderboards group. All of it may stay empty.",
        'description = ""',
        commented('recipe = ""', "SAEs that differ in sparsity or seed alone share a recipe"),
        setting("trained_on", spec.trained_on, "the dataset"),
        commented(l0[0], f"{l0[1]}; adds the PCA control of that rank"),
        "# seed = 0",
        'licence = ""',
        'paper = ""',
        "",
        "[weights]",
    ]
    weights = spec.weights
    if weights.hub:
        lines += [setting("hub", weights.hub), setting("revision", weights.revision)]
        lines += [setting("filename", weights.filename)]
    else:
        lines.append(setting("file", weights.file, "relative to this file"))
    lines.append(setting("sha256", weights.sha256))
    if weights.beside:
        lines += ["", "# Configurations that say what the weights mean.", "[weights.beside]"]
        lines += [setting(name, sha256) for name, sha256 in weights.beside.items()]
    if spec.semantics or asked:
        lines += ["", "# What the file does not say.", "[semantics]"]
        lines += [setting(name, value) for name, value in spec.semantics.items()]
        lines += [question(one) for one in asked.values()]
    return "\n".join(lines) + "\n"


def _said(record: Record) -> list[str]:
    """What the file says of its training, and what a reader should know, as comments."""
    lines: list[str] = []
    if record.trained_on:
        lines.append("# Its file says that it was trained on:")
        lines += [f"#   {key:<8} {words}" for key, words in record.trained_on.items()]
    return lines + comments("\n".join(record.notes))


def print_new_sae(
    registry: Registry,
    name: str | None,
    source: str | None,
    facts: Sequence[str],
    *,
    out: str,
    interactive: bool,
    **options: str | None,
) -> int:
    """`saebench new sae`: 1 where the entry is not complete. facts: as typed, NAME=VALUE.

    interactive: whether somebody is there to be asked. Errors: as `new_sae`.
    """
    semantics = parse_facts(facts)
    ask = from_terminal if interactive else None
    new = new_sae(registry, name, source, out=out, semantics=semantics, ask=ask, **options)
    said = new.record.trained_on
    print(f"format     {new.record.format or 'not known yet'}")
    for key, word in (("backbone", "model"), ("site", "hook"), ("tokens", "tokens")):
        by_file = f"   (its file says: {said[word]})" if word in said else ""
        print(f"{key:<10} {getattr(new.spec, key)}{by_file}")
    print(f"wrote {new.path}")
    if not new.missing:
        print(f"next: saebench check sae {new.spec.name} --registry {out}")
        return 0
    print("It cannot be read yet: the file does not say")
    print("\n".join(listed(new.missing)))
    print(
        f"Fill that in where it stands as a comment in {new.path}, or type the command again with "
        "--set NAME=VALUE"
    )
    if estimable := [one.name for one in new.missing if one.estimate]:
        print(
            f"saebench estimate {new.spec.name} --registry {out}   "
            f"finds {', '.join(estimable)} from train activations"
        )
    return 1
