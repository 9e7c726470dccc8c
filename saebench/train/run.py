"""`saebench train`: names to activations, activations to SAEs, SAEs to registry entries."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from saebench.backbones import load_backbone
from saebench.data import open_dataset
from saebench.errors import Mismatch
from saebench.formats import read_entry, read_sae, write_sae
from saebench.identity import canonical_json, content_hash
from saebench.registry import Registry
from saebench.rows import choose_device
from saebench.train.checkpoint import Checkpoint
from saebench.train.config import TrainConfig
from saebench.train.entry import check_out, entry_path, write_entry
from saebench.train.fit import Measured, fit, measure
from saebench.train.identity import access_of, identity_of
from saebench.train.job import Job, resolve
from saebench.train.recipe import Recipe
from saebench.train.sources import BackboneSource, CodesSource
from saebench.train.stream import Source, Stream
from saebench.train.trainee import Trainee
from saebench.waves import memory_bytes


@dataclass(frozen=True)
class TrainedSae:
    """One SAE of a call: its entry, and what was measured on a sample of its training rows.

    `measured` is None for an SAE that was there already and was not trained again, and for one
    that diverged: `diverged` then says where, and nothing is written.
    """

    name: str
    path: Path
    recipe: Recipe
    measured: Measured | None
    seconds: float = 0.0
    diverged: str = ""


class Watch:
    """What a call tells of its progress; this one keeps silent."""

    def begin(self, names: Sequence[str], steps: int, n_images: int | None) -> None: ...
    def images(self, n: int) -> None: ...
    def bad_image(self, why: str) -> None: ...
    def step(self, done: int, trainees: Sequence[Trainee]) -> None: ...


def train(config: TrainConfig, watch: Watch | None = None) -> list[TrainedSae]:
    """Train the SAEs of a call and write their entries. Those that are there are left alone.

    Errors: UsageError and its kin before anything is computed; NonFiniteError when
    every SAE diverges; one that does so beside others is reported, and the others are finished.
    """
    watch = watch or Watch()
    out = Path(config.out).expanduser()
    check_out(out)
    registry = _registry(config, out)
    job = resolve(config, registry, out)
    found = [TrainedSae(n, entry_path(out, n), r, None) for n, r in job.done.items()]
    identity = _identity(config, job)
    checkpoint = Checkpoint(
        out / "_training" / f"{identity[:16]}.pt", identity, 60 * config.checkpoint_minutes
    )
    if not job.todo:
        checkpoint.remove()
        return found
    device = choose_device(config.device)
    stream = Stream(
        _source(config, registry, job, device, watch),
        config.batch_rows,
        memory=memory_bytes(config.memory),
    )
    # Windows pass images again in every epoch, so that their number says nothing of the end.
    n_images = stream.source.n_images if stream.cached else None
    watch.begin(list(job.todo), config.steps, n_images)
    diverged: dict[Recipe, str] = {}
    started = time.perf_counter()
    fitted = fit(
        list(job.todo.values()),
        stream,
        device=device,
        start=job.start,
        checkpoint=checkpoint,
        watch=watch.step,
        on_divergence=diverged.__setitem__,
    )
    seconds = time.perf_counter() - started
    names = {recipe: name for name, recipe in job.todo.items()}
    for one in fitted:
        name = names[one.recipe]
        path = entry_path(out, name)
        weights = path.with_suffix(".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        extra = {
            "training": one.recipe.plain(),
            **vars(job.place),
            "identity": identity_of(one.recipe, job.rows, config.save_dtype),
        }
        sha256 = write_sae(one.sae, weights, extra=extra, dtype=config.save_dtype)
        # Measured as it is read back, so with the rounding of the file.
        measured = measure(read_sae(weights).to(device), stream, device)
        write_entry(path, weights.name, sha256, job.place, one.recipe, measured, config.licence)
        found.append(TrainedSae(name, path, one.recipe, measured, seconds / len(fitted)))
    for recipe, why in diverged.items():
        name = names[recipe]
        found.append(TrainedSae(name, entry_path(out, name), recipe, None, diverged=why))
    checkpoint.remove()
    return found


def _source(
    config: TrainConfig, registry: Registry, job: Job, device: torch.device, watch: Watch
) -> Source:
    backbone = load_backbone(job.backbone, device=str(device))
    parts = []
    for name in job.datasets:
        spec = registry.dataset(name)
        dataset = open_dataset(spec, access_of(config, spec))
        order = dataset.manifest(spec.train).order(config.train_limit)
        parts.append((dataset, spec.train, order))
    source: Source = BackboneSource(
        backbone,
        job.site,
        job.kinds,
        parts,
        batch_size=config.batch_size,
        workers=config.workers,
        bad_images=config.bad_images,
        watch=watch.images,
        on_bad=watch.bad_image,
    )
    for parent in reversed(job.parents):
        sae = read_entry(parent)
        if sae.d_model != source.d_model:
            raise Mismatch(
                f"the SAE '{parent.name}' reads {sae.d_model} dimensions, not {source.d_model}"
            )
        source = CodesSource(source, sae, device)
    return source


def _identity(config: TrainConfig, job: Job) -> str:
    """What a checkpoint belongs to: all recipes of the call, written or not, and their rows.

    Images at once are part of it: they move last bits of the activations, and a training goes on
    with the bits that it began with.
    """
    recipes = sorted(canonical_json(r.plain()) for r in (*job.todo.values(), *job.done.values()))
    return content_hash({"recipes": recipes, "rows": job.rows, "batch_size": config.batch_size})


def _registry(config: TrainConfig, out: Path) -> Registry:
    """The search path, with the output folder in it unless it is there anyway."""
    registry = Registry.load(config.registry)
    if out.resolve() in (origin.root.resolve() for origin in registry.origins):
        return registry
    return Registry.load([*config.registry, out])
