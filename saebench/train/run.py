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
from saebench.identity import content_hash
from saebench.plan import memory_bytes
from saebench.registry import Registry
from saebench.rows import choose_device
from saebench.specs import semantic_fields
from saebench.train.checkpoint import Checkpoint
from saebench.train.config import TrainConfig
from saebench.train.entry import check_out, entry_path, write_entry
from saebench.train.fit import Measured, fit, measure
from saebench.train.job import Job, resolve
from saebench.train.recipe import Recipe
from saebench.train.sources import BackboneSource, CodesSource
from saebench.train.stream import Source, Stream
from saebench.train.trainee import Trainee
from saebench.weights import weights_sha256


@dataclass(frozen=True)
class TrainedSae:
    """One SAE of a call: its entry, and what was measured on a sample of its training rows.

    `measured` is None for an SAE that was there already and was not trained again.
    """

    name: str
    path: Path
    recipe: Recipe
    measured: Measured | None
    seconds: float = 0.0


class Watch:
    """What a call tells of its progress; this one keeps silent."""

    def begin(self, names: Sequence[str], steps: int, n_images: int | None) -> None: ...
    def images(self, n: int) -> None: ...
    def step(self, done: int, trainees: Sequence[Trainee]) -> None: ...


def train(config: TrainConfig, watch: Watch | None = None) -> list[TrainedSae]:
    """Train the SAEs of a call and write their entries. Those that are there are left alone.

    Errors: UsageError and its kin before anything is computed; NonFiniteError when it diverges.
    """
    watch = watch or Watch()
    out = Path(config.out).expanduser()
    check_out(out)
    registry = _registry(config, out)
    job = resolve(config, registry, out)
    found = [TrainedSae(n, entry_path(out, n), r, None) for n, r in job.done.items()]
    if not job.todo:
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
    identity = _identity(config, job, registry)
    checkpoint = Checkpoint(
        out / "_training" / f"{identity[:16]}.pt", identity, 60 * config.checkpoint_minutes
    )
    started = time.perf_counter()
    fitted = fit(
        list(job.todo.values()),
        stream,
        device=device,
        start=job.start,
        checkpoint=checkpoint,
        watch=watch.step,
    )
    seconds = time.perf_counter() - started
    for name, one in zip(job.todo, fitted, strict=True):
        path = entry_path(out, name)
        weights = path.with_suffix(".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        extra = {"training": one.recipe.plain(), **vars(job.place)}
        sha256 = write_sae(one.sae, weights, extra=extra, dtype=config.save_dtype)
        # Measured as it is read back, so with the rounding of the file.
        measured = measure(read_sae(weights).to(device), stream, device)
        write_entry(path, weights.name, sha256, job.place, one.recipe, measured, config.licence)
        found.append(TrainedSae(name, path, one.recipe, measured, seconds / len(fitted)))
    checkpoint.remove()
    return found


def _source(
    config: TrainConfig, registry: Registry, job: Job, device: torch.device, watch: Watch
) -> Source:
    backbone = load_backbone(job.backbone, device=str(device))
    parts = []
    for name in job.datasets:
        spec = registry.dataset(name)
        dataset = open_dataset(spec)
        order = dataset.manifest(spec.train).order(config.train_limit)
        parts.append((dataset, spec.train, order))
    source: Source = BackboneSource(
        backbone,
        job.site,
        job.kinds,
        parts,
        batch_size=config.batch_size,
        workers=config.workers,
        watch=watch.images,
    )
    for parent in reversed(job.parents):
        sae = read_entry(parent)
        if sae.d_model != source.d_model:
            raise Mismatch(
                f"the SAE '{parent.name}' reads {sae.d_model} dimensions, not {source.d_model}"
            )
        source = CodesSource(source, sae, device)
    return source


def _identity(config: TrainConfig, job: Job, registry: Registry) -> str:
    """What a checkpoint belongs to: the recipes, and everything that decides the rows."""
    hashes = [weights_sha256(spec.weights, spec.path) for spec in job.parents]
    return content_hash(
        {
            "recipes": [recipe.plain() for recipe in job.todo.values()],
            "place": vars(job.place),
            "backbone": semantic_fields(job.backbone),
            "weights": [weights_sha256(job.backbone.weights, job.backbone.path), *hashes],
            "datasets": [semantic_fields(registry.dataset(name)) for name in job.datasets],
            "batch_size": config.batch_size,
            "memory": config.memory,
        }
    )


def _registry(config: TrainConfig, out: Path) -> Registry:
    """The search path, with the output folder in it unless it is there anyway."""
    registry = Registry.load(config.registry)
    if out.resolve() in (origin.root.resolve() for origin in registry.origins):
        return registry
    return Registry.load([*config.registry, out])
