"""`saebench.run`: from keyword arguments, or a RunConfig, to a DataFrame and a results folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.data import Access, open_dataset
from saebench.errors import DataError, UsageError
from saebench.heads import PROBE_IMAGES
from saebench.plan import Plan, make_plan
from saebench.registry import Registry
from saebench.results import ResultsFolder
from saebench.runconfig import RunConfig
from saebench.specs import DatasetSpec
from saebench.strict import validated
from saebench.taskfiles import source_sha256
from saebench.units import STATISTICS_IMAGES, Source, Unit

if TYPE_CHECKING:
    import pandas as pd

    from saebench.runner import Watch


CHANGED_TASK = (
    "the file of the task '{name}' has changed since some of these rows were measured: bump its "
    "version if a number could change, or measure again with --overwrite all"
)


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    plan: Plan
    rows: pd.DataFrame  # the rows of everything that was asked for and is there
    failed: tuple[Unit, ...]
    path: Path  # the merged table
    changed_tasks: tuple[str, ...] = ()  # whose kept rows another state of their file measured


def config_of(**options: Any) -> RunConfig:
    """A RunConfig from keywords; one name may stand for a list. Errors: SpecError, UsageError."""
    for name in ("backbone", "sae", "task", "dataset", "registry", "option"):
        if isinstance(options.get(name), (str, Path)):
            options[name] = (str(options[name]),)
        elif name in options:
            options[name] = tuple(str(item) for item in options[name] or ())
    if "shots" in options:
        shots = () if options["shots"] is None else options["shots"]
        options["shots"] = tuple(map(_plain, shots if isinstance(shots, Iterable) else (shots,)))
    for name in ("out", "device", "data_root"):
        if options.get(name) is not None:
            options[name] = str(options[name])
    options = {key: _plain(value) for key, value in options.items()}
    return validated(RunConfig, options, where="saebench.run")


def _plain(value: Any) -> Any:
    """NumPy's numbers are as good as Python's."""
    return value.item() if hasattr(value, "item") else value


def run(**options: Any) -> pd.DataFrame:
    """Measure, write `<out>/results.parquet`, and return the rows of what was asked for.

    The keywords are those of `saebench run` (see RunConfig). Units that fail are left out, and are
    named in a warning; their records lie in `<out>/_errors`.
    """
    import warnings

    result = execute(config_of(**options))
    if result.failed:
        names = "; ".join(unit.label for unit in result.failed[:5])
        warnings.warn(
            f"{len(result.failed)} units failed ({names}): see saebench status", stacklevel=2
        )
    for name in result.changed_tasks:
        warnings.warn(CHANGED_TASK.format(name=name), stacklevel=2)
    for refusal in result.plan.refused:
        warnings.warn(f"{refusal.name} was left out: {refusal.error}", stacklevel=2)
    return result.rows


def plan_run(config: RunConfig, registry: Registry | None = None) -> Plan:
    """What a run would do. The results folder is read where it is there, and never made."""
    registry = registry or Registry.load(config.registry)
    folder = ResultsFolder(Path(config.out))
    return make_plan(config, registry, source_of, _is_done(config, folder))


def execute(config: RunConfig, watch: Watch | None = None) -> RunResult:
    """Plan and run. Whatever happens, what was finished is merged into the table."""
    from saebench.rows import Environment
    from saebench.runner import GroupRun, Watch, run_groups
    from saebench.store import Store

    if config.dry_run:
        raise UsageError("a dry run measures nothing", "use saebench.plan_run(config)")
    registry = Registry.load(config.registry)
    environment = Environment.of(config, registry)
    plan = make_plan(config, registry, source_of, _is_done(config, ResultsFolder(Path(config.out))))
    folder = ResultsFolder(Path(config.out), create=True)
    store = Store()
    watch = watch or Watch()
    if config.overwrite == "all":
        for unit in plan.todo:  # their rows stay until there are new ones
            folder.partial.discard(unit.id)
    try:
        failed = run_groups(
            plan.groups,
            lambda group: GroupRun(group, config, registry, folder, store, environment, watch),
        )
    finally:
        path = folder.merge()
    rows = folder.rows()
    asked = rows["unit_id"].isin([unit.id for unit in plan.units])
    rows = rows.loc[asked].reset_index(drop=True)
    return RunResult(plan, rows, tuple(failed), path, changed_tasks(plan, rows))


def changed_tasks(plan: Plan, rows: pd.DataFrame) -> tuple[str, ...]:
    """Tasks of which rows were kept although their file has changed under the same version."""
    now = {unit.task.name: source_sha256(unit.task) for unit in plan.done}
    measured = rows[["task", "task_sha256"]].drop_duplicates().dropna()
    pairs = zip(measured["task"], measured["task_sha256"], strict=True)
    return tuple(sorted({task for task, then in pairs if now.get(task, then) != then}))


def _is_done(config: RunConfig, folder: ResultsFolder) -> Callable[[str], bool]:
    """Whether a unit is left alone: its rows are there, or it failed and is not to be tried."""
    if config.overwrite == "all":
        return lambda unit_id: False
    failed = set(folder.errors()) if config.overwrite == "never" else set()
    return lambda unit_id: folder.has(unit_id) or unit_id in failed


def source_of(spec: DatasetSpec, config: RunConfig) -> Source:
    """Hash and size of the two splits of a dataset that a run uses."""
    n_train = config.train_limit or STATISTICS_IMAGES
    access = Access.of(config.data_root, {spec.test: config.limit, spec.train: n_train})
    dataset = open_dataset(spec, access)
    test, train = dataset.manifest(spec.test), dataset.manifest(spec.train)
    if shared := set(test.ids) & set(train.ids):
        raise DataError(
            f"{spec.path or spec.name}: {len(shared)} images are in both '{spec.train}' and "
            f"'{spec.test}', the first is '{min(shared)}'",
            "statistics and probes must not see what is measured: mend the splits",
        )
    return Source(
        spec,
        test.sha256,
        train.sha256,
        min(config.limit or len(test.ids), len(test.ids)),
        min(n_train, len(train.ids)),
        min(config.train_limit or PROBE_IMAGES * len(dataset.class_names), len(train.ids)),
        min(config.train_limit or len(train.ids), len(train.ids)),
        access,
        dataset,
        dataset.resolved_revision,
        test.stratified and train.stratified,
        not config.train_limit and not train.stratified and len(train.ids) >= n_train,
    )
