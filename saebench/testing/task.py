"""Checks a task: it reports what it declares, and its state can be saved and merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from saebench.backbones import load_backbone
from saebench.batch import SaeBatch
from saebench.controls import Identity
from saebench.data.access import Access
from saebench.images import Images, rebased
from saebench.registry import Registry
from saebench.rows import check_value, interval
from saebench.task import REPLICATES, Context, Measurement, Task, variant_string
from saebench.taskfiles import load_task
from saebench.testing.report import N_IMAGES, Check, attempt, real_images


def check_task(
    registry: Registry, name: str, backbone: str = "tiny-vit", *, access: Access | None = None
) -> Iterator[Check]:
    """Declares what it reports, and its state merges: two halves folded equal the whole."""
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
    task: type[Task] = held["task"]
    batch_of, ctx = _identity_batches(registry, backbone, access)

    def measure(cuts: list[tuple[int, int]], fold: bool) -> list[Measurement]:
        parts = []
        for first, stop in cuts:
            part = task()
            part.start(ctx)
            part.update(batch_of(first, stop))
            parts.append(part)
        if not fold:
            return list(parts[0].results())
        whole = task()
        whole.start(ctx)
        for part in parts:
            whole.merge(part.state())
        return list(whole.results())

    def reports() -> str:
        found = measure([(0, N_IMAGES)], fold=False)
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

    def folds() -> str:
        half = N_IMAGES // 2
        folded = measure([(0, half), (half, N_IMAGES)], fold=True)
        for one, two in zip(held["found"], folded, strict=True):
            assert _alike(one, two), (
                f"'{one.metric}' [{one.group}]: {one.value} whole, {two.value} folded"
            )
        return "two halves folded equal the whole"

    yield (reported := attempt("reports what it declares", reports))
    if reported.passed:
        yield attempt("its state can be saved and merged", folds)


def _alike(a: Measurement, b: Measurement) -> bool:
    if a.value is None or b.value is None:
        return a.value is b.value
    if (interval(a)[0] is None) != (interval(b)[0] is None):
        return False
    return bool(np.isclose(a.value, b.value, rtol=1e-9, atol=1e-12))


def _identity_batches(
    registry: Registry, name: str, access: Access | None
) -> tuple[Callable[[int, int], SaeBatch], Context]:
    """Real activations of an embedded backbone behind the identity control."""
    spec = registry.buildable(name)
    backbone = load_backbone(spec)
    dataset, order, images_b3hw = real_images(backbone, registry, access=access)
    manifest = dataset.manifest(dataset.spec.test)
    site = spec.sites[spec.site]
    kinds = tuple(site.kinds)
    coder = Identity(site.width)
    ctx = Context(
        backbone=name,
        sae="identity",
        dataset=dataset.spec.name,
        site=spec.site,
        tokens="all",
        d_model=site.width,
        d_sae=coder.d_sae,
        kinds=rebased(site.kinds, kinds),
        n_images=len(order),
        class_names=dataset.class_names,
        labels=dataset.label_names,
        shift_d=np.zeros(site.width),
    )

    def batch_of(first: int, stop: int) -> SaeBatch:
        index = order[first:stop]
        images = Images(
            backbone,
            dataset.spec.name,
            [manifest.ids[i] for i in index],
            manifest.labels[index],
            {level: values[index] for level, values in manifest.levels.items()},
            first,
            backbone.acts(images_b3hw[first:stop], [spec.site]),
        )
        return SaeBatch(images.view(spec.site, kinds), coder, tile_bytes=2**26)

    return batch_of, ctx
