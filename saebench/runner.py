"""One group: one pass over the images of a split for each wave, all SAEs, all tasks; rows out.

Images are cut at fixed boundaries into segments of 2,048. Each segment is seen by fresh tasks,
whose states are written at once; a unit's rows are the fold of its segments in index order. Resume
after a kill, an out-of-memory retry and (later) shards are this one mechanism.

An exception of one (SAE, task) drops that unit with an error record and the pass goes on. An error
of the backbone or the data ends the group.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from saebench.backbones import Backbone, load_backbone
from saebench.bad_images import BadImages
from saebench.batch import CoderError
from saebench.contexts import context_of
from saebench.data import Dataset, open_dataset
from saebench.data.loader import choose_workers
from saebench.errors import DataError, NonFiniteError, is_out_of_memory
from saebench.evaluation import Evaluation
from saebench.fit import Fitter
from saebench.images import Images
from saebench.loading import Loaded, load_coders
from saebench.plan import Group
from saebench.probing.collect import Collector
from saebench.probing.prober import Fitting, Probing
from saebench.reading import Reading
from saebench.registry import Registry
from saebench.results import ResultsFolder
from saebench.rows import Environment, named_latents, unit_rows
from saebench.runconfig import RunConfig
from saebench.store import Store
from saebench.task import Batch, Task
from saebench.tiles import TILE_BYTES, Tiles
from saebench.units import Unit, backbone_identity
from saebench.waves import Wave

SEEN = "n_images_seen"  # beside a task's own state: how many images of the segment decoded


class Watch:
    """What a run tells whoever watches it. Every method may be overridden; none has to be."""

    def group(self, group: Group, n_images: int) -> None: ...
    def images(self, n: int) -> None: ...
    def train_images(self, n: int) -> None: ...
    def collecting(self, n_images: int) -> None: ...
    def collected(self, n: int) -> None: ...
    def fitting(self, fitting: Fitting) -> None: ...
    def say(self, text: str) -> None: ...
    def failed(self, unit: Unit, error: BaseException) -> None: ...


@dataclass
class GroupRun:
    """One backbone over one dataset, for one config, into one results folder."""

    group: Group
    config: RunConfig
    registry: Registry
    folder: ResultsFolder
    store: Store
    environment: Environment
    watch: Watch = field(default_factory=Watch)
    recorded: set[Unit] = field(default_factory=set)  # units whose failure is on disk
    bad: BadImages | None = None  # once the dataset is open

    def run(self) -> list[Unit]:
        """Measure every unit of the group. Returns the units that failed, each with its record."""
        failed: list[Unit] = []
        waiting = [unit for wave in self.group.waves for unit in wave.units]
        try:
            self.watch.group(self.group, self._n_passes())
            device = self.environment.torch_device
            dtype = getattr(torch, self.config.dtype)
            self.backbone: Backbone = load_backbone(
                self.group.backbone, device=device, dtype=dtype, last_block=self.config.last_block
            )
            source = self.group.source
            self.dataset: Dataset = source.dataset or open_dataset(source.spec, source.access)
            asked = self.config.workers
            self.workers = choose_workers(self.dataset, device) if asked is None else asked
            bad = self.bad = BadImages(self.folder.out, self.dataset, self.watch.say)
            self.evaluation = Evaluation(
                self.backbone,
                self.dataset,
                source,
                workers=self.workers,
                bad_images=self.config.bad_images,
                bad=bad,
                tokens=self.store if self.config.store == "tokens" else None,
            )
            self.reading = Reading(self.backbone, self.dataset, source)
            self.tiles = Tiles(TILE_BYTES, self.config.batch_size)
            self.probing = self._probing()
            for wave in self.group.waves:
                failed += self._wave(wave)
                waiting = [unit for unit in waiting if unit not in wave.units]
        except Exception as error:
            # Of the backbone or the data: nothing that is left in this group can be measured.
            # What failed for a reason of its own keeps its record.
            for unit in waiting:
                if unit not in self.recorded:
                    self._fail(unit, error)
            failed += waiting
        finally:
            if self.bad is not None:
                self.bad.report()
        return failed

    def _probing(self) -> Probing:
        collector = Collector(
            self.backbone,
            self.dataset,
            self.group.source,
            self.store,
            self.config.dtype,
            self.tiles,
            self.workers,
            self.config.bad_images,
            on_pass=self.watch.collecting,
            on_images=self.watch.collected,
            on_bad=self.evaluation.bad.add,
            say=self.watch.say,
        )
        return Probing(collector, self.config.seed, self.watch.fitting)

    def _n_passes(self) -> int:
        return self.group.source.n_images * len(self.group.waves)

    def _wave(self, wave: Wave) -> list[Unit]:
        failed: dict[Unit, None] = {}
        fitter = Fitter(
            self.backbone,
            self.dataset,
            self.group.source,
            self.store,
            lambda *sites: backbone_identity(self.group.backbone, *sites),
            self.config.dtype,
            self.tiles,
            self.workers,
            self.config.bad_images,
            on_images=self.watch.train_images,
            on_bad=self.evaluation.bad.add,
            ahead=self.reading.ahead(wave.units),
        )
        loaded = load_coders(
            wave.coders,
            backbone=self.backbone,
            registry=self.registry,
            fitter=fitter,
            seed=self.config.seed,
        )
        self.evaluation.means.update(loaded.means)
        self.reading.prepare(wave.units, fitter)
        self.probing.prepare(wave.units, loaded)
        for unit in wave.units:
            error = loaded.errors.get(unit.coder) or self.reading.error(unit)
            if error := error or self.probing.error(unit):
                self._fail(unit, error)
                failed[unit] = None
        started = time.perf_counter()
        partial = self.folder.partial
        finished = {unit.id: partial.segments(unit.id) for unit in wave.units}
        states: dict[str, dict[str, np.ndarray]] = {}
        for segment in range(self.group.source.n_segments):
            todo = [u for u in wave.units if u not in failed and segment not in finished[u.id]]
            if todo:
                states, broken = self._segment(segment, todo, loaded)
                failed.update(dict.fromkeys(broken))
                if self.group.source.n_segments > 1:
                    partial.save_many(segment, states)
            else:
                self.watch.images(len(self.evaluation.places(segment)))
        seconds = time.perf_counter() - started
        for unit in wave.units:
            if unit not in failed:
                in_memory = states.get(unit.id) if self.group.source.n_segments == 1 else None
                if not self._finish(unit, loaded, in_memory, seconds):
                    failed[unit] = None
        return list(failed)

    def _segment(
        self, segment: int, units: Iterable[Unit], loaded: Loaded
    ) -> tuple[dict[str, dict[str, np.ndarray]], list[Unit]]:
        """States of one segment, and the units that failed in it.

        When memory runs out, tasks have seen a part of the segment, so it is begun again.
        """
        while True:
            shown = 0
            running = {unit: self._started(unit, loaded) for unit in units}
            broken: dict[Unit, Exception] = {}
            try:
                sites = sorted({loaded.places[unit.coder].site for unit in running})
                for batch in self.evaluation.batches(segment, sites, self.tiles.batch_size):
                    try:
                        self._update(batch, running, broken, loaded)
                    finally:
                        batch.forget()
                    self.watch.images(len(batch.ids))
                    shown += len(batch.ids)
                break
            except Exception as error:
                del running
                self.watch.say(self.tiles.make_do(error))
                self.watch.images(-shown)
        for unit, error in broken.items():
            self._fail(unit, error)
        states = {
            unit.id: {**task.state(), SEEN: np.array(shown)}
            for unit, task in running.items()
            if unit not in broken
        }
        return states, list(broken)

    def _update(
        self,
        images: Images,
        running: Mapping[Unit, Task],
        broken: dict[Unit, Exception],
        loaded: Loaded,
    ) -> None:
        by_coder: dict[object, list[Unit]] = {}
        for unit in running:
            if unit not in broken:
                by_coder.setdefault(unit.coder, []).append(unit)
        for units in by_coder.values():
            batch: Batch | None = None
            for unit in units:
                try:
                    member = loaded.member(unit.coder)
                    batch = batch or member.batch(images, self.tiles.tile_bytes)
                    running[unit].update(batch)
                except (CoderError, NonFiniteError) as error:
                    broken.update(dict.fromkeys(units, error))
                    break
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    broken[unit] = error

    def _started(self, unit: Unit, loaded: Loaded) -> Task:
        task = unit.task()
        ctx = context_of(
            unit,
            loaded,
            self.backbone,
            self.dataset,
            self.reading.of(unit),
            self.probing.of(unit),
            seed=self.config.seed,
        )
        task.start(ctx)
        return task

    def _finish(
        self,
        unit: Unit,
        loaded: Loaded,
        in_memory: Mapping[str, np.ndarray] | None,
        seconds: float,
    ) -> bool:
        """Fold the segments of a unit in index order and write its rows. False: it failed."""
        try:
            task, n_seen = self._started(unit, loaded), 0
            for segment in range(self.group.source.n_segments):
                state = in_memory or self.folder.partial.load(unit.id, segment)
                if state is None and self.folder.has(unit.id):
                    return True  # another run has just finished this unit
                if state is None:  # damaged since it was written
                    states, broken = self._segment(segment, [unit], loaded)
                    if broken:
                        return False
                    state = states[unit.id]
                n_seen += int(state[SEEN])
                task.merge({name: array for name, array in state.items() if name != SEEN})
            if not n_seen:
                raise DataError(
                    f"none of the {self.group.source.n_images} images could be decoded",
                    "which they are, and why, is in the list of bad images",
                )
            rows, replicates = unit_rows(
                unit, task, loaded.coders[unit.coder], self.environment, seconds, n_seen
            )
            columns = None if unit.conventions else task.latents()
            latents = named_latents(columns, self.evaluation.ids, self.dataset.class_names)
            self.folder.write_unit(
                unit.id, unit.identity, rows, latents=latents, replicates=replicates
            )
        except Exception as error:
            self._fail(unit, error)
            return False
        self.folder.clear_error(unit.id)
        self.folder.partial.discard(unit.id)
        return True

    def _fail(self, unit: Unit, error: BaseException) -> None:
        detail = "".join(traceback.format_exception(error))
        self.recorded.add(unit)
        self.folder.write_error(unit.id, unit.identity, error, detail)
        self.watch.failed(unit, error)


def run_groups(groups: Iterable[Group], make: Callable[[Group], GroupRun]) -> list[Unit]:
    """Run groups one after the other in this process. Returns the units that failed."""
    return [unit for group in groups for unit in make(group).run()]
