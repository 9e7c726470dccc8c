"""The pass over a sample's images, chunk by chunk, and what is done where something goes wrong.

an error of a coder         its units have it, and the others go on
memory runs out             a smaller tile or batch, and the chunk is begun again: with another size
                            of batches all tables of a chunk are others
the store is not writable   tables in memory, and the chunk is begun again
an image does not decode    an error, or it is left out: then all tables of its chunk are others
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from saebench.coders import CoderRef
from saebench.errors import (
    DataError,
    Mismatch,
    WriteError,
    is_out_of_memory,
)
from saebench.evaluation import Evaluation
from saebench.identity import content_hash
from saebench.images import Images
from saebench.loading import Loaded
from saebench.probing.collected import Asked, Collected, Name
from saebench.probing.jobs import Filling, Job, refused
from saebench.probing.sample import Sample
from saebench.probing.tables import CodesTable, FeatureTable
from saebench.units import SEGMENT, Unit

if TYPE_CHECKING:
    from saebench.probing.collect import Collector

CHUNK = 16 * SEGMENT  # images; a protocol constant
PASSES = 3  # over a chunk, at most, where other images do not decode each time


@dataclass(frozen=True, eq=False)
class Chunk:
    """Images of a sample, from the one at `start` on."""

    start: int
    rows: np.ndarray
    ids: Sequence[str]

    @cached_property
    def hash(self) -> str:
        return content_hash(self.ids)


class _Again(Exception):
    """A chunk has to be begun again."""


class Collecting:
    """One call of `Collector.collect`."""

    def __init__(
        self, whose: Collector, asked: Sequence[Asked], sample: Sample, loaded: Loaded
    ) -> None:
        self.whose, self.asked, self.sample, self.loaded = whose, asked, sample, loaded
        self.tables, self.tiles = whose.tables, whose.tiles
        self.errors: dict[Unit, Exception] = {}
        self.missing: dict[Unit, dict[str, str]] = {}
        self.jobs: dict[str, Job] = {}  # by their identity
        self.job_of: dict[tuple[Unit, Name], Job] = {}
        self.found: dict[tuple[Chunk, Job], FeatureTable | CodesTable] = {}
        self.batch: dict[Chunk, int] = {}  # images in a batch, of all tables of a chunk
        self.shown = 0  # images of a chunk, in the pass over it
        self.bad: dict[str, str] = {}  # ids of a chunk's images that did not decode -> why
        self.chunks = [
            Chunk(start, sample.rows[start : start + CHUNK], sample.ids[start : start + CHUNK])
            for start in range(0, len(sample), CHUNK)
        ]

    def run(self) -> Collected:
        """Everything that is asked for, from the store or from a pass."""
        for one in self.asked:
            self._plan(one)
        todo = [chunk for chunk in self.chunks if self._left_of(chunk)]
        if todo:
            self.whose.on_pass(sum(len(chunk.ids) for chunk in todo))
            self._measure(todo)
        return self._collected()

    def _plan(self, asked: Asked) -> None:
        """The tables of a unit."""
        unit, feature = asked.unit, asked.feature
        if unit.coder in self.loaded.errors:
            self.errors[unit] = self.loaded.errors[unit.coder]
            return
        coder = self.loaded.coders[unit.coder]
        self.missing[unit] = refused(coder, self.loaded.parents.get(unit.coder, ()), feature)
        pooled: list[Name] = [("codes", pooling) for pooling in feature.poolings]
        names: list[Name] = [("x", None), ("xhat", None), *pooled]
        for what, pooling in names:
            if what not in self.missing[unit]:
                fields = self.whose.keys.fields(unit, feature, what, pooling, coder=coder)
                job = Job(what, feature, fields, pooling)
                job = self.jobs.setdefault(job.id, job)
                job.units.append(unit)
                self.job_of[unit, (what, pooling)] = job

    def _left_of(self, chunk: Chunk) -> list[Job]:
        """The tables of a chunk that are not there, of units that have not failed."""
        if len(self.whose.left_out.get(chunk.hash, ())) == len(chunk.ids):
            return []  # not one of its images decodes
        if self.batch.get(chunk) != self.tiles.batch_size:
            self.batch[chunk] = self.tiles.batch_size
            self._drop(chunk)
        left = []
        for job in self.jobs.values():
            if self._is_read(job) and (chunk, job) not in self.found:
                table = job.find(self.tables, self._fields(chunk, job))
                if table is None:
                    left.append(job)
                else:
                    self.found[chunk, job] = table
        return left

    def _drop(self, chunk: Chunk) -> None:
        """Its tables have to be others than those that were found."""
        for job in self.jobs.values():
            self.found.pop((chunk, job), None)

    def _is_of(self, unit: Unit, job: Job) -> bool:
        """Whether a unit still reads a table."""
        return unit not in self.errors and job.what not in self.missing[unit]

    def _is_read(self, job: Job) -> bool:
        return any(self._is_of(unit, job) for unit in job.units)

    def _fields(self, chunk: Chunk, job: Job) -> dict[str, Any]:
        """What identifies the table of a chunk."""
        bad = self.whose.left_out.get(chunk.hash)
        left_out = {"left_out": content_hash(bad)} if bad else {}
        return {**job.fields, "images": chunk.hash, "batch": self.batch[chunk], **left_out}

    def _measure(self, chunks: Sequence[Chunk]) -> None:
        """One pass over the images of these chunks."""
        whose = self.whose
        stream = Evaluation(
            whose.backbone,
            whose.dataset,
            whose.source,
            workers=whose.workers,
            bad_images=whose.bad_images,
            bad=self,
            split=whose.source.spec.train,
            rows=np.concatenate([chunk.rows for chunk in chunks]),
        )
        stream.means.update(self.loaded.means)
        for i, chunk in enumerate(chunks):
            self._measure_chunk(stream, chunk, i * CHUNK)

    def add(self, split: str, row: int, why: str) -> None:
        """Note an image that does not decode."""
        self.bad[self.whose.dataset.manifest(split).ids[row]] = why
        self.whose.on_bad(split, row, why)

    def _measure_chunk(self, stream: Evaluation, chunk: Chunk, first: int) -> None:
        """Pass over a chunk until all of its tables are there. first: its place in the stream."""
        passes = 0
        while jobs := self._left_of(chunk):
            fillings = {
                job: job.begun(self.tables, self._fields(chunk, job), len(jobs)) for job in jobs
            }
            try:
                self._pass(stream, chunk, first, fillings)
                self._settle(chunk, fillings)
            except _Again:
                self.whose.on_images(-self.shown)
                continue
            finally:
                for filling in fillings.values():
                    filling.writer.drop()
            passes += 1
            if passes > PASSES:
                raise DataError(
                    f"other images of '{self.whose.source.spec.name}' cannot be decoded each time",
                    "run it again once the disk or the network answers",
                )

    def _pass(
        self, stream: Evaluation, chunk: Chunk, first: int, fillings: dict[Job, Filling]
    ) -> None:
        """Show all images of a chunk to its tables, which are filled. Errors: _Again."""
        self.shown, stop = 0, first + len(chunk.ids)
        self.bad.clear()
        try:
            for segment in range(first // SEGMENT, -(-stop // SEGMENT)):
                sites = {self.loaded.places[u.coder].site for job in fillings for u in job.units}
                for images in stream.batches(segment, sorted(sites), self.tiles.batch_size):
                    if not fillings:
                        return  # all that was asked for has failed
                    try:
                        self._show(images, fillings, first)
                    finally:
                        images.forget()
                    self.whose.on_images(len(images.ids))
                    self.shown += len(images.ids)
        except Exception as error:
            self.whose.say(self.tiles.make_do(error))
            raise _Again from None

    def _show(self, images: Images, fillings: dict[Job, Filling], first: int) -> None:
        """One batch of images. Tables that nobody reads any more are dropped."""
        by_coder: dict[CoderRef, list[Filling]] = {}
        for job, filling in fillings.items():
            reader = next((unit for unit in job.units if self._is_of(unit, job)), None)
            if reader is not None:
                by_coder.setdefault(reader.coder, []).append(filling)
        places = np.arange(images.first, images.first + len(images.ids)) - first
        for ref, of_coder in by_coder.items():
            try:
                batch = self.loaded.member(ref).batch(images, self.tiles.tile_bytes)
            except Exception as error:
                self._fail([unit for f in of_coder for unit in f.job.units], error)
                continue
            for filling in of_coder:
                units = filling.job.units
                if not self._is_read(filling.job):
                    continue  # what came before it in this loop has failed
                try:
                    filling.append(batch, places)
                except WriteError as error:
                    self.tables.give_up(error)
                    raise _Again from error
                except Mismatch as error:
                    for unit in units:
                        self.missing[unit][filling.job.what] = error.what
                except Exception as error:
                    self._fail(units, error)
        for job in list(fillings):
            if not self._is_read(job):
                fillings.pop(job).writer.drop()

    def _fail(self, units: Sequence[Unit], error: Exception) -> None:
        """An error of a coder: of its units alone. Errors: itself, where memory ran out."""
        if is_out_of_memory(error):
            raise error
        self.errors |= {unit: error for unit in units if unit not in self.errors}

    def _settle(self, chunk: Chunk, fillings: dict[Job, Filling]) -> None:
        """Complete the tables of a chunk. Errors: _Again."""
        bad = tuple(id for id in chunk.ids if id in self.bad)
        if bad != self.whose.left_out.get(chunk.hash, ()):
            self.whose.left_out[chunk.hash] = bad
            self._drop(chunk)  # those are of other images
        try:
            for job, filling in fillings.items():
                filling.writer.complete(self._fields(chunk, job))
        except WriteError as error:
            self.tables.give_up(error)
            raise _Again from error

    def _collected(self) -> Collected:
        tables: dict[tuple[Unit, Name], list[FeatureTable | CodesTable]] = {}
        for (unit, name), job in self.job_of.items():
            if self._is_of(unit, job):
                found = [self.found.get((chunk, job)) for chunk in self.chunks]
                tables[unit, name] = [table for table in found if table is not None]
        present = [np.zeros(0, dtype=np.int64)]
        if whole := [unit for unit in self.missing if unit not in self.errors]:
            x = self.job_of[whole[0], ("x", None)]
            found = {chunk: self.found.get((chunk, x)) for chunk in self.chunks}
            present += [chunk.start + table.places for chunk, table in found.items() if table]
        bad = [id for chunk in self.chunks for id in self.whose.left_out.get(chunk.hash, ())]
        if len(bad) == len(self.sample):
            raise DataError(
                f"none of the {len(bad)} images of '{self.whose.source.spec.name}', split "
                f"'{self.whose.source.spec.train}', that probes are fitted on can be decoded",
                "the first of them, and why, are in the list of bad images",
            )
        left_out = content_hash(bad) if bad else ""
        missing = {unit: why for unit, why in self.missing.items() if unit not in self.errors}
        sizes = [self.batch.get(chunk, self.tiles.batch_size) for chunk in self.chunks]
        batch = sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
        return Collected(np.concatenate(present), left_out, batch, self.errors, missing, tables)
