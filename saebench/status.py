"""What of a run is done, failed or missing, and why a unit on disk is not one of this run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.errors import NotFound, ResultsError
from saebench.plan import Plan
from saebench.results import ResultsFolder
from saebench.runconfig import RunConfig
from saebench.units import Unit

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Status:
    """The units of a run, sorted by what became of them."""

    done: tuple[Unit, ...]
    failed: tuple[tuple[Unit, str], ...]  # with the first line of the reason
    partial: tuple[tuple[Unit, int], ...]  # with the number of segments that are there
    missing: tuple[Unit, ...]


def status_of(plan: Plan, folder: ResultsFolder) -> Status:
    """Sort the units of a plan by what the results folder has of them."""
    errors = folder.errors()
    done, failed, partial, missing = [], [], [], []
    for unit in plan.units:
        if folder.has(unit.id):
            done.append(unit)
        elif unit.id in errors:
            failed.append((unit, str(errors[unit.id].get("error", "")).splitlines()[0]))
        elif segments := folder.partial.segments(unit.id):
            partial.append((unit, len(segments)))
        else:
            missing.append(unit)
    return Status(tuple(done), tuple(failed), tuple(partial), tuple(missing))


def existing_folder(out: str) -> ResultsFolder:
    """The results folder of `--out`. Errors: ResultsError when nothing was ever written there."""
    if not Path(out).is_dir():
        raise ResultsError(
            f"there is no results folder {out}", "saebench run --out DIR   writes one"
        )
    return ResultsFolder(Path(out))


def explain(plan: Plan, folder: ResultsFolder, unit_id: str) -> list[str]:
    """Lines that say how a unit on disk differs from this run's unit of the same names.

    `unit_id` may be a prefix. Errors: NotFound.
    """
    identities = folder.identities()
    matches = [known for known in identities if known.startswith(unit_id)]
    if len(matches) != 1:
        raise NotFound(
            f"{len(matches)} units in {folder.out} begin with '{unit_id}'",
            "their ids are the column unit_id, and the names of the files in _rows",
        )
    stored = identities[matches[0]]
    names = _names(stored)
    lines = [f"{matches[0]}  {' · '.join(names)}"]
    same = [unit for unit in plan.units if _names(unit.identity) == names]
    if not same:
        return [*lines, "this run has no unit of these names"]
    for unit in same:
        if unit.id == matches[0]:
            return [*lines, "is a unit of this run"]
        lines += [
            f"{key}: stored {old!r}, this run {new!r}"
            for key, old, new in differences(stored, unit.identity)
        ]
    return lines


def _names(identity: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        str(identity.get(key, {}).get("name", "")) for key in ("backbone", "sae", "task", "dataset")
    )


def differences(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, old, new) of every leaf in which two nested values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{at}[{i}]")
    elif old != new:
        yield at, old, new


def print_status(config: RunConfig, why: str | None, console: Console) -> int:
    """Print the status of a run, or why a unit is not one of it. Returns 1 when units failed."""
    from saebench.api import plan_run

    folder = existing_folder(config.out)
    # Every unit counts here, also those that a run would leave alone.
    plan = plan_run(dataclasses.replace(config, overwrite="failed"))
    if why is not None:
        for line in explain(plan, folder, why):
            console.print(line, markup=False, soft_wrap=True)
        return 0
    status = status_of(plan, folder)
    console.print(
        f"{config.out}: {len(status.done)} done, {len(status.failed)} failed, "
        f"{len(status.partial)} begun, {len(status.missing)} missing of {len(plan.units)} units",
        markup=False,
    )
    for unit, reason in status.failed:
        console.print(
            f"  failed   {unit.id[:12]}  {unit.label}: {reason}", markup=False, soft_wrap=True
        )
    for unit, n in status.partial:
        segments = f"{n} of {unit.source.n_segments} segments"
        console.print(
            f"  begun    {unit.id[:12]}  {unit.label}: {segments}", markup=False, soft_wrap=True
        )
    for unit in status.missing[:20]:
        console.print(f"  missing  {unit.id[:12]}  {unit.label}", markup=False, soft_wrap=True)
    if len(status.missing) > 20:
        console.print(f"  … and {len(status.missing) - 20} more", markup=False)
    for refusal in plan.refused:
        console.print(f"  left out {refusal.name}: {refusal.error}", markup=False, soft_wrap=True)
    return 1 if status.failed or plan.refused else 0
