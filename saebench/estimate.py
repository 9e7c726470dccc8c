"""`saebench estimate`: says of an SAE what its file and entry do not, from train activations.

Only facts that a format marks as such are estimated (`saebench.formats.facts.Estimate`), and only
by this command: no run guesses. They go into a statistics file beside the entry, which then names
it, so that every row of results says which facts were estimated (`sae_estimated`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import saebench
from saebench import paths
from saebench.api import config_of, source_of
from saebench.atomic import check_folder, make_folder, write_bytes
from saebench.backbones import load_backbone
from saebench.beside import statistics_path
from saebench.coders import CoderRef, check_fit, token_kinds
from saebench.data import open_dataset
from saebench.data.loader import choose_workers
from saebench.errors import SpecError, UsageError
from saebench.fit import Fitter
from saebench.formats import facts_of, read_entry
from saebench.formats.facts import Missing, MissingFacts
from saebench.formats.statistics import (
    NAMES,
    Origin,
    origins_of,
    read_statistics,
    write_statistics,
)
from saebench.identity import content_hash
from saebench.loading import check_widths
from saebench.registry import Registry
from saebench.rows import choose_device
from saebench.saes import Sae
from saebench.scaffold import entry_path, relative
from saebench.scaffold.asking import without_questions
from saebench.specs import SaeSpec
from saebench.store import Store
from saebench.strict import read_spec
from saebench.tiles import TILE_BYTES, Tiles
from saebench.tomledit import with_key
from saebench.trainfacts import (
    SCALINGS,
    CentredNorm,
    LeastKept,
    Moments,
    Outcome,
    mean_of,
    scaling_facts,
)
from saebench.units import backbone_identity, coder_identity
from saebench.weights import local_path

if TYPE_CHECKING:
    from rich.console import Console

_PLACEHOLDERS: Mapping[str, Any] = {"input": "raw", "threshold": 0.0}  # while it is not known


@dataclass(frozen=True)
class Estimated:
    """The facts that were found, where they are written, and what the SAE does with them."""

    facts: Mapping[str, Tensor]
    entry: Path
    statistics: Path
    origin: Origin  # from what they were estimated
    l0: float
    fvu: float | None  # None for a transcoder


def estimate(
    registry: Registry,
    name: str,
    *,
    k: int | None = None,
    dataset: str | None = None,
    images: int = 2048,
    out: str | None = None,
    device: str = "auto",
    data_root: str | None = None,
    on_images: Callable[[int], None] = lambda n: None,
) -> Estimated:
    """Estimate what is missing, write it beside the entry, and name it there.

    What an earlier estimate found, and the entry still names, stays as it is.

    k: of a threshold, the latents a row that it shall keep, where the file does not say. images: of
    the train split, the first so many. out: a content folder in which a copy of the entry is
    written, and the entry itself left alone.
    Errors: UsageError (nothing is missing, k is, or is given in vain, no images, a built-in
    entry); WriteError for a place that cannot be written; SpecError for missing facts that no
    activations tell; those of reading the SAE, its backbone and its dataset.
    """
    if images < 1:
        raise UsageError(f"--images {images}: there is nothing to estimate from", "--images 2048")
    spec = registry.sae(name)
    missing, k = _missing(spec, k)
    target = _Target.of(registry, spec, out, missing)
    if spec.site.startswith("sae:"):
        raise UsageError(f"'{name}' reads another SAE: what it lacks has to be said in its entry")
    backbone_spec = registry.buildable(spec.backbone)
    site = check_fit(backbone_spec, spec)
    kinds = token_kinds(site, spec.tokens, who=name)
    first_look = {one: _PLACEHOLDERS[one] for one in missing}
    sae = read_entry(spec, facts_of(spec).also(first_look, "estimated"))
    check_widths((spec,), {name: sae}, site.width, spec.site)

    config = config_of(
        dataset=dataset or (), train_limit=images, data_root=data_root, device=device
    )
    source = source_of(registry.dataset(dataset or backbone_spec.dataset), config)
    backbone = load_backbone(backbone_spec, device=choose_device(device))
    data = source.dataset or open_dataset(source.spec, source.access)
    fitter = Fitter(
        backbone,
        data,
        source,
        Store(),
        partial(backbone_identity, backbone_spec),
        config.dtype,
        Tiles(TILE_BYTES, config.batch_size),
        choose_workers(data, backbone.device),
        on_images=on_images,
    )
    place = (backbone, spec.site, kinds)
    (moments,) = fitter.fit([partial(Moments, *place)])
    mean_d = mean_of(moments.arrays)
    found: dict[str, Tensor] = {}

    def as_it_is(more: Mapping[str, Any]) -> tuple[Sae, dict[str, Any]]:
        """The SAE with what is found so far, and what identifies it."""
        so_far = facts_of(spec).also(found, "estimated").also(more, "estimated")
        identity = coder_identity(registry, CoderRef(name, spec.site, spec.tokens, spec))
        said = {fact: content_hash(value.tolist()) for fact, value in found.items()}
        return read_entry(spec, so_far).to(backbone.device), {"sae": identity, "found": said}

    if "input" in missing:
        how = missing["input"].estimate
        norm = None
        if how == "mean_norm":
            (centred,) = fitter.fit([partial(CentredNorm, *place, mean_d, moments.id)])
            norm = float(centred.arrays["norm"])
        found |= scaling_facts(how, moments.arrays, norm)
    if "threshold" in missing:
        sae, key = as_it_is({"threshold": 0.0})
        (least,) = fitter.fit([partial(LeastKept, *place, sae, k, key)])
        found["threshold"] = torch.tensor(least.arrays["least"].mean())
    found = {fact: value.float() for fact, value in found.items()}
    sae, key = as_it_is({})
    (after,) = fitter.fit([partial(Outcome, *place, sae, mean_d, key)])
    seen = {fact: float(value) for fact, value in after.arrays.items()}

    origin = {
        "sae": name,
        "backbone": spec.backbone,
        "site": spec.site,
        "tokens": spec.tokens,
        "dataset": source.spec.name,
        "split": source.spec.train,
        "images": str(source.n_train),
        "manifest": source.train_sha256,
        "saebench_version": saebench.__version__,
        **({"k": str(k)} if "threshold" in missing else {}),
    }
    target.write(found, origin)
    fvu = None if sae.transcoder else seen["residual"] / seen["total"]
    return Estimated(found, target.entry, target.statistics, origin, seen["l0"] / seen["n"], fvu)


def _missing(spec: SaeSpec, k: int | None) -> tuple[dict[str, Missing], int]:
    """Fact -> what is asked; and the k of a threshold (0 where there is none to find).

    Errors: UsageError where nothing is missing, or k; SpecError where more is.
    """
    facts = facts_of(spec)
    try:
        read_entry(spec, facts)
    except MissingFacts as error:
        missing = {one.name: one for one in error.missing}
    else:
        raise UsageError(
            f"nothing is missing: '{spec.name}' can be read as it is",
            "to estimate a fact, remove it (or  statistics) from [semantics] of its entry",
        )
    if others := [one for one in missing.values() if one.name not in _estimable(one)]:
        listed = "; ".join(f"{one.name} ({one.about})" for one in others)
        written = "   ".join(f"{one.name} = {one.choices}" for one in others)
        raise SpecError(
            f"{spec.path}: activations do not tell: {listed}",
            f"write under [semantics] first:   {written}",
        )
    if "threshold" not in missing:
        if k is not None:
            raise UsageError(
                f"--k {k} is of a threshold, and what is missing is {', '.join(missing)}",
                "leave --k out",
            )
        return missing, 0
    said = [fact.value for fact in facts.record("").facts if fact.name == "k"]
    if k is not None and said and said[0] != k:
        raise UsageError(f"--k {k}, and its file or entry says k = {said[0]}", "leave --k out")
    k = k if k is not None else (int(said[0]) if said else None)
    if k is None or k < 1:
        raise UsageError(
            "a threshold keeps as many latents as the SAE was trained with, and its file does not "
            "say how many",
            f"saebench estimate {spec.name} --k K",
        )
    return missing, k


def _estimable(one: Missing) -> tuple[str, ...]:
    if one.estimate in SCALINGS:
        return ("input",)
    return ("threshold",) if one.estimate == "threshold" else ()


@dataclass(frozen=True)
class _Target:
    """Where the facts go, the text of the entry that will name them, and those already known."""

    entry: Path
    statistics: Path
    text: str
    earlier: Mapping[str, Tensor]
    origins: Mapping[str, Origin]  # of the earlier ones

    @classmethod
    def of(
        cls, registry: Registry, spec: SaeSpec, out: str | None, answered: Iterable[str]
    ) -> _Target:
        """Errors: UsageError (built in, there already), WriteError, SpecError (its text)."""
        old, origin = Path(spec.path), registry.saes.origin(spec.name)
        text = without_questions(old.read_text(encoding="utf-8"), answered)
        entry = old if out is None else entry_path("sae", spec.name, out)
        statistics = entry.with_name(f"{entry.stem}.statistics.safetensors")
        text = with_key(text, "semantics", "statistics", statistics.name, where=spec.path)
        known = statistics_path(spec)
        earlier = (read_statistics(known), origins_of(known)) if known else ({}, {})
        if entry.absolute() == old.absolute():
            writable = os.access(old, os.W_OK) and os.access(old.parent, os.W_OK)
            if origin.root == paths.CONTENT or not writable:
                why = "is built in" if origin.root == paths.CONTENT else "cannot be written"
                raise UsageError(
                    f"{old} {why}", f"saebench estimate {spec.name} --out FOLDER   writes a copy"
                )
            check_folder(entry.parent)
            return cls(entry, statistics, text, *earlier)
        check_folder(entry.parent)
        if entry.exists():
            raise UsageError(f"{entry} is there already", "choose another --out, or remove it")
        text = with_key(text, "", "replaces", origin.label, where=spec.path)
        if spec.weights.file is not None:
            file = relative(local_path(spec, spec.weights.file), entry.parent)
            text = with_key(text, "weights", "file", file, where=spec.path)
        return cls(entry, statistics, text, *earlier)

    def write(self, facts: Mapping[str, Tensor], origin: Origin) -> None:
        """The statistics first: an entry never names a file that is not there."""
        assert set(facts) <= set(NAMES)
        make_folder(self.entry.parent)
        origins = {**self.origins, **dict.fromkeys(facts, origin)}
        write_statistics(self.statistics, {**self.earlier, **facts}, origins)
        write_bytes(self.entry, self.text.encode())
        read_spec(SaeSpec, self.entry, origin["sae"])


def print_estimate(registry: Registry, name: str, console: Console, **options: Any) -> int:
    """`saebench estimate`: with a bar on a terminal. Errors: those of `estimate`."""
    from rich.progress import BarColumn, Progress, TextColumn

    from saebench.bars import stepping_aside

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:,.0f} images"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task("train activations", total=None)
    origin_of = registry.saes.origin(name).root
    with bar, stepping_aside(bar):
        done = estimate(registry, name, on_images=partial(bar.advance, task), **options)
    origin = done.origin
    lines = [
        f"from the first {int(origin['images']):,} images of {origin['dataset']}/{origin['split']} "
        f"through {origin['backbone']}, {origin['site']} ({origin['tokens']}):",
        *(f"  {fact:<11} {_shown(value)}" for fact, value in done.facts.items()),
        f"L0 {done.l0:.4g}" + ("" if done.fvu is None else f", fvu {done.fvu:.4f}"),
        f"wrote {done.statistics}",
        f"wrote {done.entry}",
        f"next: saebench check sae {name} --registry {options.get('out') or origin_of}",
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    return 0


def _shown(value: Tensor) -> str:
    if value.ndim == 0:
        return f"{float(value):.6g}"
    low, high = float(value.min()), float(value.max())
    return f"{len(value)} values, {low:.4g} to {high:.4g}"
