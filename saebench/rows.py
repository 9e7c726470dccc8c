"""From a finished task to rows: checked measurements, with all that says whose they are.

A row is one measured number in long format; `saebench.results` holds the columns' meaning.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import saebench
from saebench import paths
from saebench.errors import SaebenchError, UsageError
from saebench.identity import content_hash
from saebench.metrics.bootstrap import percentile_interval
from saebench.registry import Registry
from saebench.results import SCHEMA_VERSION
from saebench.runconfig import RunConfig
from saebench.task import Measurement, Metric, Task, variant_string
from saebench.taskfiles import source_sha256
from saebench.weights import weights_revision
from saebench.whose import coder_columns

if TYPE_CHECKING:
    from saebench.saes import Coder
    from saebench.together import Together
    from saebench.units import Unit


@dataclass(frozen=True)
class Environment:
    """The columns that are the same for all rows of a run."""

    config: RunConfig
    registry: Registry
    run_id: str
    torch_device: torch.device

    @classmethod
    def of(cls, config: RunConfig, registry: Registry) -> Environment:
        """Errors: UsageError for a device that is not there."""
        run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"
        return cls(config, registry, run_id, choose_device(config.device))

    @cached_property
    def columns(self) -> dict[str, Any]:
        sha, dirty = checkout_state()
        on_cpu = self.torch_device.type == "cpu"
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "seed": self.config.seed,
            "limit": self.config.limit,
            "device": device_name(self.torch_device),
            "dtype": self.config.dtype,
            "batch": self.config.batch_size,
            "deterministic": on_cpu or torch.are_deterministic_algorithms_enabled(),
            "saebench_version": saebench.__version__,
            "git_sha": sha,
            "git_dirty": dirty,
            "torch_version": torch.__version__,
            "env": json.dumps(package_versions(), sort_keys=True),
        }

    def peak_memory(self) -> int:
        """Peak bytes so far: of the GPU on a GPU, else of this process."""
        if self.torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device)
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def unit_rows(
    unit: Unit,
    task: Task,
    coder: Coder | Together,
    environment: Environment,
    seconds: float,
    n_seen: int,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """All rows of a unit, and its replicate values under `group|metric|variant`.

    `n_seen`: images that were measured; fewer than planned where some did not decode.
    Errors: SaebenchError for a metric that the task does not declare, or a value out of bounds.
    """
    common = {**environment.columns, **_unit_columns(unit, coder, environment)}
    common |= {"seconds": seconds, "peak_mem_bytes": environment.peak_memory()}
    common |= {"n_skipped": unit.source.n_images - n_seen}
    declared = {metric.name: metric for metric in task.metrics}
    rows, replicates = [], {}
    for found in task.results():
        if found.metric not in declared:
            raise SaebenchError(
                f"the task '{task.name}' reports '{found.metric}', which it does not declare",
                f"add it to  metrics  of {task.__class__.__name__}",
            )
        if unit.conventions and "convention" not in found.variant:
            continue  # our own formulas are in the unit without conventions
        metric = declared[found.metric]
        low, high = interval(found)
        check_value(task, metric, found)
        rows.append(
            {
                **common,
                **found.columns,
                **found.variant,
                "group": found.group,
                "metric": found.metric,
                "variant": variant_string(found.variant),
                "unit": metric.unit,
                "better": metric.better,
                "value": found.value,
                "ci_low": low,
                "ci_high": high,
                "n": found.n,
                "n_images": found.n_images or n_seen,
                "note": found.note,
            }
        )
        if found.replicates is not None:
            key = f"{found.group}|{found.metric}|{variant_string(found.variant)}"
            replicates[key] = np.asarray(found.replicates, dtype=np.float64)
    return rows, replicates


def named_latents(
    columns: Mapping[str, np.ndarray] | None, ids: Sequence[str], class_names: Sequence[str]
) -> dict[str, np.ndarray] | None:
    """A task's latents table with ids for positions in `top_images`, and names in `best_class`."""
    if columns is None:
        return None
    names = {"top_images": ids, "best_class": class_names}
    return {
        name: _named(column, names[name]) if name in names else column
        for name, column in columns.items()
    }


def _named(index: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Names at the positions; what is masked stays masked."""
    known = np.asarray(names, dtype=np.str_)
    named = known[np.ma.filled(np.ma.masked_array(index), 0)]
    return np.ma.masked_array(named, np.ma.getmaskarray(index))


def interval(found: Measurement) -> tuple[float | None, float | None]:
    """95 % interval: the task's own, else percentiles of the replicates, else none."""
    if found.value is None or found.replicates is None:
        return found.ci_low, found.ci_high
    return percentile_interval(found.replicates)


def check_value(task: Task, metric: Metric, found: Measurement) -> None:
    """Errors: SaebenchError for NaN, infinity, out of bounds, or undefined without a reason."""
    where = f"{task.name}/{metric.name} [{found.group}]"
    if found.value is None:
        if not found.note:
            raise SaebenchError(f"{where} is undefined and does not say why: give it a note")
        return
    if not math.isfinite(found.value):
        raise SaebenchError(f"{where} is {found.value}: undefined is None with a note")
    if "convention" in found.variant:
        return  # another project's formula, which need not keep to the bounds of ours
    low, high = metric.bounds
    slack = 1e-9  # a rounding step beyond a closed bound is not an error
    if (low is not None and found.value < low - slack) or (
        high is not None and found.value > high + slack
    ):
        raise SaebenchError(f"{where} = {found.value} is outside its bounds {metric.bounds}")


def _unit_columns(unit: Unit, coder: Coder | Together, environment: Environment) -> dict[str, Any]:
    backbone, identity = unit.backbone, unit.identity
    return {
        **coder_columns(unit.coder, coder, identity["sae"], backbone, environment.registry),
        "unit_id": unit.id,
        "created_utc": datetime.now(UTC),
        "split": unit.source.spec.test,
        "backbone": backbone.name,
        "backbone_family": backbone.family,
        "backbone_architecture": backbone.architecture,
        "pretraining": backbone.pretraining,
        "corpus": backbone.corpus,
        "backbone_hash": content_hash(identity["backbone"])[:32],
        "backbone_revision": weights_revision(backbone) or None,
        "backbone_sha256": identity["backbone"]["weights"],
        "sae_hash": content_hash(identity["sae"])[:32],
        "task": unit.task.name,
        "task_version": unit.task.version,
        "task_sha256": source_sha256(unit.task),
        "dataset": unit.source.spec.name,
        "dataset_revision": unit.source.resolved_revision or unit.source.spec.revision,
        "dataset_sha256": unit.source.test_sha256,
        "stratified": unit.source.stratified,
    }


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU that is there, else the CPU. Errors: UsageError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: {first}", "use  --device cpu  or  auto") from None
    return device


def device_name(device: torch.device) -> str:
    """The device as a reader of a table knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def package_versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "platform": sys.platform}
    for package in ("timm", "open_clip_torch", "torchvision", "numpy", "scikit-learn", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def checkout_state() -> tuple[str, bool | None]:
    """Commit of the checkout that runs, and whether it was changed; ('', None) when installed."""
    if not (paths.CONTENT / ".git").exists():
        return "", None
    git = ["git", "-C", str(paths.CONTENT)]
    try:
        sha = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "", None
    if sha.returncode or status.returncode:
        return "", None
    return sha.stdout.strip(), bool(status.stdout.strip())
