"""`saebench run` as a person sees it: the plan, a progress bar, errors as they come, the table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from saebench.activation_size import size_line
from saebench.api import CHANGED_TASK, RunResult, execute, plan_run
from saebench.bars import stepping_aside
from saebench.plan import Group, Plan
from saebench.probe_options import LONG
from saebench.probing.prober import Fitting
from saebench.probing.size import probe_line
from saebench.registry import Registry
from saebench.report import print_tables
from saebench.runconfig import RunConfig
from saebench.runner import Watch
from saebench.units import Unit

if TYPE_CHECKING:
    import pandas as pd


class ProgressWatch(Watch):
    """A bar a group on a terminal; a line a group where the output goes to a file."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[of]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.current: TaskID | None = None
        self.statistics: TaskID | None = None
        self.collection: TaskID | None = None
        self.fits: TaskID | None = None
        self.told: set[str] = set()  # whose fits have begun
        self.n_failed = 0

    def group(self, group: Group, n_images: int) -> None:
        coders = [coder for wave in group.waves for coder in wave.coders]
        together = " together" if any(coder.members for coder in coders) else ""
        n = sum(len(coder.parts) for coder in coders)
        what = "1 SAE or control" if n == 1 else f"{n} SAEs and controls{together}"
        text = f"{group.backbone.name} · {group.source.spec.name} · {what}"
        if not self.console.is_terminal:
            self.console.print(text, markup=False)
        self.current = self.bar.add_task(escape(text), total=n_images, of="images")

    def images(self, n: int) -> None:
        if self.current is not None:
            self.bar.advance(self.current, n)

    def train_images(self, n: int) -> None:
        # Train statistics that the store lacks: how many images they take is not known before.
        if self.statistics is None:
            self.statistics = self.bar.add_task("fitting train statistics", total=None, of="images")
        self.bar.advance(self.statistics, n)

    def collecting(self, n_images: int) -> None:
        if not self.console.is_terminal:
            self.say(f"collecting features of {n_images:,} train images for probes")
        if self.collection is not None:
            self.bar.remove_task(self.collection)
        text = "collecting features"
        self.collection = self.bar.add_task(text, total=n_images, of="train images")

    def collected(self, n: int) -> None:
        if self.collection is not None:
            self.bar.advance(self.collection, n)

    def fitting(self, fitting: Fitting) -> None:
        # To a file, what takes long is said of each fit, and else of a coder's first alone.
        begins = fitting.who not in self.told
        self.told.add(fitting.who)
        if not self.console.is_terminal and (begins or fitting.n_images > LONG):
            n = f"{fitting.n_images:,} train images"
            self.say(f"{fitting.who}: fitting {fitting.what}, on {n}")
        if self.fits is None:
            self.fits = self.bar.add_task("fitting probes", of="")
        self.bar.update(self.fits, total=fitting.of, completed=fitting.done + 1)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def failed(self, unit: Unit, error: BaseException) -> None:
        self.n_failed += 1
        if self.n_failed <= 10:
            self.console.print(
                f"failed: {unit.label}: {error}", style="red", markup=False, soft_wrap=True
            )
        elif self.n_failed == 11:
            self.console.print("… more failed units are listed by  saebench status", style="red")


def run_with_progress(config: RunConfig, console: Console, messages: Console) -> int:
    """Run, print the table, and return the exit status. Tables go to `console`."""
    if config.dry_run:
        plan = plan_run(config)
        print_plan(plan, console)
        registry = Registry.load(config.registry)
        if config.store == "tokens":
            console.print(size_line(plan, registry), markup=False, soft_wrap=True)
        if line := probe_line(plan, registry):
            console.print(line, markup=False, soft_wrap=True)
        return 1 if plan.refused else 0
    started = time.perf_counter()
    watch = ProgressWatch(messages)
    try:
        with watch.bar, stepping_aside(watch.bar):
            result = execute(config, watch)
    except KeyboardInterrupt:
        goes_on = (
            "--overwrite failed goes on from there (all would begin again)"
            if config.overwrite == "all"
            else "the same command goes on from there"
        )
        messages.print(
            "\ninterrupted: finished units are in the results folder, finished segments are kept; "
            + goes_on,
            markup=False,
            soft_wrap=True,
        )
        return 130
    print_result(result, config, console, messages, time.perf_counter() - started)
    return 1 if result.failed or result.plan.refused else 0


def print_result(
    result: RunResult, config: RunConfig, console: Console, messages: Console, seconds: float
) -> None:
    """The table, what was done in how long, and the one line of pandas that reads it all."""
    if len(result.rows):
        print_tables(result.rows, columns_for(result.rows, config), console)
        console.print(
            "↓ lower is better, ↑ higher is better; ± is half of a 95 % interval over images",
            style="dim",
        )
    n_done = len(result.plan.todo) - len(result.failed)
    done_before = f", {len(result.plan.done)} were there already" if result.plan.done else ""
    units = "1 unit" if n_done == 1 else f"{n_done} units"
    console.print(f"{units} measured in {seconds:.0f} s{done_before}", markup=False)
    for name in result.changed_tasks:
        messages.print(CHANGED_TASK.format(name=name), style="yellow", soft_wrap=True)
    for refusal in result.plan.passed_over:
        messages.print(
            f"not measured: {refusal.name}: {refusal.error}",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    for refusal in result.plan.refused:
        messages.print(
            f"left out: {refusal.name}: {refusal.error}", style="red", markup=False, soft_wrap=True
        )
    if result.failed:
        messages.print(
            f"{len(result.failed)} units failed: saebench status --out {config.out}   says why; "
            "the same command tries them again",
            style="red",
            markup=False,
        )
    console.print(f'  pd.read_parquet("{result.path}")', markup=False, soft_wrap=True)


def columns_for(rows: pd.DataFrame, config: RunConfig) -> tuple[str, ...]:
    """What a table shows: of one task alone the board of its name, where there is one."""
    registry, tasks = Registry.load(config.registry), set(rows["task"])
    alone = tasks.pop() if len(tasks) == 1 else ""
    return registry.board(alone if alone in registry.boards else "embedded").columns


def print_plan(plan: Plan, console: Console) -> None:
    """What a run would do: passes, images, SAEs and their memory, units to do and done."""
    table = Table(box=None, pad_edge=False)
    for name in ("backbone", "dataset", "images", "train", "waves", "SAEs", "GB", "units"):
        table.add_column(name, justify="left" if name in ("backbone", "dataset") else "right")
    for group in plan.groups:
        table.add_row(
            escape(group.backbone.name),
            escape(group.source.spec.name),
            f"{group.source.n_images:,}",
            f"{group.source.n_train:,}",
            str(len(group.waves)),
            str(sum(len(coder.parts) for wave in group.waves for coder in wave.coders)),
            f"{sum(wave.n_bytes for wave in group.waves) / 1e9:.2f}",
            str(sum(len(wave.units) for wave in group.waves)),
        )
    if plan.groups:
        console.print(table)
    images = sum(len(group.waves) * group.source.n_images for group in plan.groups)
    console.print(
        f"{len(plan.todo)} units to measure in {images:,} backbone passes over images, "
        f"{len(plan.done)} are there already in {Path(plan.config.out)}",
        markup=False,
    )
    for refusal in plan.passed_over:
        console.print(
            f"not measured: {refusal.name}: {refusal.error}", markup=False, soft_wrap=True
        )
    for refusal in plan.refused:
        console.print(f"left out: {refusal.name}: {refusal.error}", markup=False, soft_wrap=True)
