"""From a RunConfig to what has to be computed: units, grouped by pass and packed into waves.

A group is one backbone over one dataset. The SAEs of a group go in waves that fit in memory; each
wave is one pass over the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saebench.coders import CoderRef, Refusal, choose
from saebench.errors import DataError, UsageError, WeightsError
from saebench.heads import check_head, head_in_use, readouts_identity, said_once
from saebench.modelfiles import model_files
from saebench.options import Chosen, not_default, read_options, values_of
from saebench.probe_options import (
    LONG,
    by_shots,
    check_probes,
    check_shots,
    feature_said_once,
    label_said_once,
    needs_probes,
    probes_identity,
)
from saebench.registry import Registry, is_glob
from saebench.runconfig import RunConfig
from saebench.sets import spliced_together, splicing_tasks
from saebench.specs import BackboneSpec, DatasetSpec, semantic_fields
from saebench.task import Task
from saebench.taskfiles import load_task
from saebench.units import (
    PROTOCOL,
    Source,
    Unit,
    backbone_identity,
    coder_identity,
    head_identity,
    root_sites,
)
from saebench.waves import Wave, memory_bytes, waves_of
from saebench.weights import weights_sha256


@dataclass(frozen=True)
class Group:
    """One backbone over one dataset."""

    backbone: BackboneSpec
    source: Source
    waves: tuple[Wave, ...]


@dataclass(frozen=True)
class Plan:
    """What a run will do. `done` are units whose rows are there already."""

    config: RunConfig
    groups: tuple[Group, ...]
    units: tuple[Unit, ...]
    done: tuple[Unit, ...]
    refused: tuple[Refusal, ...] = ()  # what was meant and cannot be measured
    passed_over: tuple[Refusal, ...] = ()  # what a default leaves out here, and nobody asked for

    @property
    def todo(self) -> tuple[Unit, ...]:
        return tuple(u for g in self.groups for w in g.waves for u in w.units)


def make_plan(
    config: RunConfig,
    registry: Registry,
    source_of: Callable[[DatasetSpec, RunConfig], Source],
    is_done: Callable[[str], bool] = lambda unit_id: False,
) -> Plan:
    """Expand a config to units, drop the done ones, group and pack the rest.

    A backbone or dataset that cannot be had here is refused, with the reason, where there are
    others; where it is all that was asked for, the error is raised.

    `source_of` looks at a dataset's manifests; `is_done(unit_id)` says whether rows are there
    and are to be kept. Errors: NotFound, Mismatch and SpecError for what does not fit.
    """
    check_config(config)
    backbones = [registry.buildable(spec.name) for spec in _backbones(config, registry)]
    tasks = [load_task(registry, name) for name in registry.match_tasks(config.task)]
    if not config.task and config.suite == "default":
        tasks = [task for task in tasks if task.suite == "default"]
    if config.splice_together:
        tasks = splicing_tasks(tasks, config.task)
    check_shots(tasks, config.shots)
    chosen = read_options(config.option, tasks)
    choice = choose(registry, backbones, config.sae, config.suite)
    if config.splice_together:
        choice = spliced_together(choice, registry, backbones, default=not config.sae)
    refused = {refusal.name: refusal for refusal in choice.refused}
    passed_over: dict[str, Refusal] = {}
    sources: dict[str, Source] = {}
    groups, everything, done = [], [], []
    pairs = [(b, name) for b in backbones for name in _datasets(config, registry, b)]
    for backbone, name in pairs:
        if backbone.name in refused or name in refused:
            continue
        try:
            weights_sha256(backbone)
            model_files(backbone)
            if name not in sources:
                sources[name] = source_of(registry.dataset(name), config)
        except (WeightsError, DataError) as error:
            # Not to be had on this machine: the others go on, unless there is no other.
            if len(pairs) == 1:
                raise
            where = backbone.name if isinstance(error, WeightsError) else name
            refused.setdefault(where, Refusal(where, error))
            continue
        source, units, able = sources[name], [], []
        for task in tasks:
            asked = bool(config.task) or config.suite == "full" or _is_told(config, task, chosen)
            if error := _why_not(backbone, source, task, chosen, asked=asked):
                who = backbone.name if isinstance(error, WeightsError) else name
                where = refused if asked or isinstance(error, WeightsError) else passed_over
                where.setdefault(f"{who} · {task.name}", Refusal(f"{who} · {task.name}", error))
            else:
                able.append(task)
        for coder in choice.refs[backbone.name]:
            fit = []
            for task in able:
                try:
                    if needs_probes(task):
                        feature_said_once(registry, backbone, coder, task, values_of(task, chosen))
                    fit.append(task)
                except UsageError as error:  # tokens that it does not cover: the others go on
                    place = f"{backbone.name} · {coder.site} · {coder.tokens}"
                    what = f"{place} · {coder.label} · {task.name}"
                    refused.setdefault(what, Refusal(what, error))
            try:
                units += _units(config, registry, backbone, coder, fit, source, chosen)
            except WeightsError as error:  # an SAE without a file: the others go on
                sae = coder.sae.name if coder.sae else coder.label
                refused.setdefault(sae, Refusal(sae, error))
        everything += units
        done += [unit for unit in units if is_done(unit.id)]
        left = [unit for unit in units if not is_done(unit.id)]
        if left:
            waves = tuple(waves_of(registry, left, memory_bytes(config.memory)))
            groups.append(Group(backbone, sources[name], waves))
    left_out = tuple(refused.values()), tuple(passed_over.values())
    return Plan(config, tuple(groups), tuple(everything), tuple(done), *left_out)


def _is_told(config: RunConfig, task: type[Task], chosen: Chosen) -> bool:
    """Whether a run says how a task is to be done, and so asks for it."""
    return task.name in chosen or bool(config.shots and "shots" in task.options)


def _why_not(
    backbone: BackboneSpec, source: Source, task: type[Task], chosen: Chosen, *, asked: bool
) -> WeightsError | DataError | None:
    """Why a task cannot be done on a dataset: a head without a file, images of one class.

    Not asked for, a task that takes a long pass over train images is left to who asks for it.
    """
    try:
        if "readouts" in task.needs:
            check_head(backbone, source.spec, task.name, values_of(task, chosen))
        if needs_probes(task):
            check_probes(source, task, values_of(task, chosen))
            if not asked and source.n_full > LONG:
                return DataError(
                    f"its probes take a pass over {source.n_full:,} train images",
                    f"ask for it:  --task {task.name},  or take fewer:  --train-limit {LONG}",
                )
    except (WeightsError, DataError) as error:
        return error
    return None


def check_config(config: RunConfig) -> None:
    """Errors: UsageError for a value that no run can have."""
    for name in ("limit", "train_limit", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: it has to be 1 or more")
    if config.workers is not None and config.workers < 0:
        raise UsageError(f"--workers {config.workers}: it has to be 0 or more")
    memory_bytes(config.memory)


def _backbones(config: RunConfig, registry: Registry) -> list[BackboneSpec]:
    if config.backbone:
        return [registry.backbone(name) for name in registry.backbones.match(config.backbone)]
    if exact := [p for p in config.sae if p.partition("@")[0] in registry.saes.files]:
        owners = dict.fromkeys(registry.sae(p.partition("@")[0]).backbone for p in exact)
        return [registry.backbone(name) for name in owners]
    specs = [registry.backbone(name) for name in registry.backbones]
    if globs := [p for p in config.sae if is_glob(p) and "/" in p]:
        names = registry.saes.match(p.partition("@")[0] for p in globs)
        owners = {registry.sae(name).backbone for name in names}
        return [spec for spec in specs if spec.name in owners]
    return [spec for spec in specs if spec.embedded]


def _datasets(config: RunConfig, registry: Registry, backbone: BackboneSpec) -> list[str]:
    if config.dataset:
        return registry.datasets.match(config.dataset)
    if not backbone.dataset:
        raise UsageError(
            f"the backbone '{backbone.name}' names no dataset of its own",
            f"saebench run --backbone {backbone.name} --dataset NAME   (saebench ls datasets)",
        )
    return [backbone.dataset]


def _units(
    config: RunConfig,
    registry: Registry,
    backbone: BackboneSpec,
    coder: CoderRef,
    tasks: Sequence[type[Task]],
    source: Source,
    chosen: Chosen,
) -> Iterator[Unit]:
    on_backbone = backbone_identity(backbone, *root_sites(registry, coder))
    head = head_identity(backbone, source.spec)
    sae = coder_identity(registry, coder)
    dataset = {
        "name": source.spec.name,
        **semantic_fields(source.spec),
        "test": source.test_sha256,
        "train": source.train_sha256,
        "n_images": source.n_images,
        "n_train": source.n_train,
    }
    if config.bad_images != "fail":  # images may then be left out
        dataset["bad_images"] = config.bad_images
    for task in tasks:
        for conventions, values in _variants(
            config, registry, backbone, coder, task, source, chosen
        ):
            options: dict[str, Any] = dict(not_default(task, values))
            options |= {"conventions": True} if conventions else {}
            identity = {
                "backbone": on_backbone,
                "head": head,
                "sae": sae,
                "dataset": dataset,
                "task": {"name": task.name, "version": task.version, "options": options},
                "seed": config.seed,
                "dtype": config.dtype,
                "protocol": PROTOCOL,
            }
            if "readouts" in task.needs:
                identity |= _reading_identity(backbone, source, values)
            if needs_probes(task):
                identity["probes"] = probes_identity(source, values)
            reads_output = "readouts" in task.needs or values.get("feature") == "embedding"
            if (reads_output or task.splices) and config.last_block != "full":
                identity["last_block"] = config.last_block
            yield Unit(backbone, coder, task, source, identity, conventions, values)


def _variants(
    config: RunConfig,
    registry: Registry,
    backbone: BackboneSpec,
    coder: CoderRef,
    task: type[Task],
    source: Source,
    chosen: Chosen,
) -> Iterator[tuple[bool, dict[str, str]]]:
    """For each unit of a task: whether it is that of the peers' formulas, and its options."""
    for conventions in (False, True) if config.conventions and task.has_conventions else (False,):
        values = values_of(task, chosen, conventions=conventions)
        if "readouts" in task.needs:
            values = said_once(backbone, source.spec, values)
        if needs_probes(task):
            values = feature_said_once(registry, backbone, coder, task, values)
            values = label_said_once(source, values)
        for one in by_shots(task, values, config.shots):
            yield conventions, one


def _reading_identity(
    backbone: BackboneSpec, source: Source, options: Mapping[str, str]
) -> dict[str, Any]:
    """What of the heads that a task reads is part of a unit's identity."""
    head, names = options.get("head", "auto"), options.get("names", "default")
    fields = {"readouts": readouts_identity(backbone, source.spec, source.n_probe, head)}
    if backbone.head.kind == "zero_shot":
        texts = head_in_use(backbone, source.spec, head) == "zero_shot"
        if texts:
            check_names(source, names)
        fields["texts"] = source.texts_identity(names if texts else None)
    return fields


def check_names(source: Source, names: str) -> None:
    """Errors: UsageError for a kind of class names that a dataset does not have."""
    known = source.dataset.text_names if source.dataset is not None else {names: ()}
    if names != "default" and names not in known:
        raise UsageError(
            f"the classes of '{source.spec.name}' have no names '{names}'",
            f"they have: {', '.join(known)}",
        )
