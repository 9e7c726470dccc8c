"""Checks a task: it reports what it declares, and its state can be saved and merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from saebench.controls import Identity
from saebench.data.access import Access
from saebench.registry import Registry
from saebench.rows import check_value, interval
from saebench.task import REPLICATES, Measurement, Task, variant_string
from saebench.taskfiles import load_task
from saebench.testing.report import N_IMAGES, Check, attempt
from saebench.testing.sample import Sample

# A float32 product of other rows rounds differently; a sum of the same numbers hardly.
PARTITION = (1e-4, 1e-6)  # relative, absolute
MERGED = (1e-9, 1e-12)


def check_task(
    registry: Registry, name: str, backbone: str = "tiny-vit", *, access: Access | None = None
) -> Iterator[Check]:
    """Declares what it reports, gets what it needs, and two halves folded equal the whole."""
    held: dict[str, Any] = {}

    def loads() -> str:
        held["task"] = task = load_task(registry, name)
        names = [metric.name for metric in task.metrics]
        assert names, "it declares no metric"
        assert len(set(names)) == len(names), "a metric is declared twice"
        assert isinstance(task.version, int), "its version has to be a whole number"
        return f"version {task.version}, {len(names)} metrics"

    yield (loaded := attempt("loads, and declares its metrics", loads))
    if not loaded.passed:
        return
    with TemporaryDirectory() as folder:
        sample = Sample.of(registry, backbone, access, Path(folder))
        yield from _on_sample(held["task"], sample)


def _on_sample(task: type[Task], sample: Sample) -> Iterator[Check]:
    """What it reports on the identity control, whole and in halves."""
    held: dict[str, Any] = {}
    coder = Identity(sample.backbone.spec.sites[sample.site].width)

    def ready() -> str:
        held["ctx"] = ctx = sample.context(task, coder)
        given = [f"{name} = {value}" for name, value in ctx.options.items()]
        heads = [", ".join(map(str, readout.columns.values())) for readout in ctx.readouts]
        said = [f"{len(heads)} heads ({'; '.join(heads)})"] if heads else []
        return "; ".join([*said, *given]) or "it needs none"

    yield (made := attempt("gets the heads and options it asks for", ready))
    if not made.passed:
        return

    halves = ((0, N_IMAGES // 2), (N_IMAGES // 2, N_IMAGES))

    def started() -> Task:
        new = task()
        new.start(held["ctx"])
        return new

    def measure(cuts: tuple[tuple[int, int], ...]) -> list[Measurement]:
        whole = started()
        for first, stop in cuts:
            whole.update(sample.batch(coder, first, stop))
        return list(whole.results())

    def reports() -> str:
        found = measure(((0, N_IMAGES),))
        held["found"] = found
        declared = {metric.name: metric for metric in task.metrics}
        keys = set()
        for item in found:
            assert item.metric in declared, f"reports '{item.metric}', which it does not declare"
            check_value(task(), declared[item.metric], item)
            key = (item.group, item.metric, variant_string(item.variant))
            assert key not in keys, f"reports {key} twice"
            keys.add(key)
            if declared[item.metric].interval == "bootstrap" and item.value is not None:
                assert item.replicates is not None, f"'{item.metric}' has no replicates"
                shape = item.replicates.shape
                assert shape == (REPLICATES,), f"'{item.metric}' has replicates of shape {shape}"
        assert found, "it reports nothing"
        return f"{len(found)} rows on the identity control"

    def batches() -> str:
        held["in two"] = measure(halves)
        _compare(held["found"], held["in two"], "in two batches", PARTITION)
        return "two batches give what one gives"

    def folds() -> str:
        whole = started()
        for first, stop in halves:
            part = started()
            part.update(sample.batch(coder, first, stop))
            whole.merge(part.state())
        _compare(held["in two"], list(whole.results()), "folded", MERGED)
        return "two halves folded equal the whole"

    for title, look in (
        ("reports what it declares", reports),
        ("does not depend on the batches", batches),
        ("its state can be saved and merged", folds),
    ):
        yield (done := attempt(title, look))
        if not done.passed:
            return


def _compare(
    whole: list[Measurement], other: list[Measurement], how: str, tolerance: tuple[float, float]
) -> None:
    """Errors: AssertionError naming the first value that differs."""
    for one, two in zip(whole, other, strict=True):
        assert _alike(one, two, tolerance), (
            f"'{one.metric}' [{one.group}]: {one.value} whole, {two.value} {how}"
        )


def _alike(a: Measurement, b: Measurement, tolerance: tuple[float, float]) -> bool:
    if a.value is None or b.value is None:
        return a.value is b.value
    if (interval(a)[0] is None) != (interval(b)[0] is None):
        return False
    return bool(np.isclose(a.value, b.value, *tolerance))
