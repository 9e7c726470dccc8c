"""Activations of the evaluation images, kept for later runs (`saebench run --store tokens`).

Of every site in use, all tokens and what resuming there needs, a segment (2,048 images) at a time.
A later run that finds all its sites reads them: no image is decoded, and no layer before a site is
run. From the same batch size its numbers are those of streaming to the last bit.

Tables are written while the pass runs, and are there whole or not at all; what identifies them is
in `saebench.activation_keys`, what they look like in `saebench.activation_tables`.

The last segment of a limited run is a prefix of the whole one. It is read from the whole one where
that is there and the prefix ends between two batches; else it is a table of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from saebench.activation_keys import Key, Keys, Part
from saebench.activation_tables import KIND, Table, TableWriter
from saebench.backbones import Backbone, Capture
from saebench.backbones.backbone import ENTRY
from saebench.backbones.sites import from_tokens, to_tokens
from saebench.bad_images import consecutive
from saebench.entries import MANIFEST, entry_id
from saebench.errors import WriteError
from saebench.shards import open_shards
from saebench.store import Store
from saebench.units import Source

X = "x"  # the tensor of a boundary or a branch


class ActivationStore:
    """What is kept of one backbone on one dataset. ids: all image ids in evaluation order."""

    def __init__(
        self, store: Store, backbone: Backbone, source: Source, ids: Sequence[str]
    ) -> None:
        self.store, self.keys = store, Keys(backbone, source, ids)
        self.given_up = False
        self._sound: set[Path] = set()  # tables that this process has checked

    def has(self, part: Part, sites: Sequence[str], *, left_out: bool) -> bool:
        """Whether `find` would most probably find it: looks at manifests alone."""
        keys = self.keys.of(sites)
        return any(all(self._there(key, part, flag) for key in keys) for flag in _flags(left_out))

    def find(self, part: Part, sites: Sequence[str], *, left_out: bool) -> Kept | None:
        """The activations of all these sites, every byte checked; None where one is not there.

        left_out: whether those will do from which images are missing that did not decode.
        A damaged table is named in a warning, and is not there.
        """
        keys = self.keys.of(sites)
        for flag in _flags(left_out):
            found = {key: self._open(key, part, flag) for key in keys}
            tables = {key: table for key, table in found.items() if table is not None}
            if len(tables) < len(keys):
                continue
            first, *others = (table.places[table.places < part.n] for table in tables.values())
            if all(np.array_equal(first, other) for other in others):
                return Kept(self, part, sites, tables, first)
            for table in tables.values():
                self.store.distrust(table.folder, ValueError("other images did not decode"))
        return None

    def keeping(self, part: Part, sites: Sequence[str], why: Mapping[int, str]) -> Keeping:
        """Writes what is not there yet. why: place of an image -> why it was left out."""
        missing: list[Key] = []
        if not self.given_up:
            missing = [key for key in self.keys.of(sites) if not self._there(key, part, False)]
        return Keeping(self, part, sites, missing, why)

    def give_up(self, error: WriteError) -> None:
        """Go on without keeping anything more, and say so once."""
        if not self.given_up:
            self.given_up = True
            hint = "free some space, or set SAEBENCH_STORE to a folder on another disk"
            warnings.warn(
                f"from here on activations are not kept: {error.what}\n  → {hint}", stacklevel=2
            )

    def _there(self, key: Key, part: Part, left_out: bool) -> bool:
        return any(
            (self._folder(self.keys.fields(key, one, left_out)) / MANIFEST).exists()
            for one in self.keys.candidates(part)
        )

    def _folder(self, fields: Mapping[str, Any]) -> Path:
        return self.store.root / "shards" / KIND / entry_id(KIND, fields)

    def _open(self, key: Key, part: Part, left_out: bool) -> Table | None:
        for one in self.keys.candidates(part):
            folder = self._folder(self.keys.fields(key, one, left_out))
            try:
                shards = open_shards(folder, verify=folder not in self._sound)
                if shards is None:
                    continue
                table = Table(shards)
                if not left_out and len(table.places) != one.n:
                    raise ValueError(f"{len(table.places)} images instead of {one.n}")
            except (OSError, ValueError, KeyError, TypeError) as error:
                self._sound.discard(folder)
                self.store.distrust(folder, error)
                continue
            self._sound.add(folder)
            return table
        return None


@dataclass(frozen=True)
class Kept:
    """The activations of a part, on the disk. places: [n] in the segment, ascending."""

    store: ActivationStore
    part: Part
    sites: Sequence[str]
    tables: Mapping[Key, Table]
    places: np.ndarray

    @property
    def left_out(self) -> dict[int, str]:
        """Place in the segment -> why its image is not there."""
        table = next(iter(self.tables.values()))
        missing = sorted(set(range(self.part.n)) - set(self.places.tolist()))
        return {place: table.left_out.get(place, "it did not decode") for place in missing}

    def pieces(self) -> Iterator[tuple[int, dict[str, Capture]]]:
        """Place of the first, and captures, of successive images, cut as they once were."""
        for first in range(0, self.part.n, self.part.batch):
            low, high = np.searchsorted(self.places, [first, first + self.part.batch])
            here = self.places[low:high]
            for piece in consecutive(here) if len(here) else ():
                start, stop = int(low) + piece.start, int(low) + piece.stop
                yield int(self.places[start]), self._captures(start, stop)

    def _captures(self, start: int, stop: int) -> dict[str, Capture]:
        device = self.store.keys.backbone.device
        read = {
            key: {
                name: tensor.to(device, non_blocking=True)
                for name, tensor in table.read(start, stop).items()
            }
            for key, table in self.tables.items()
        }
        keys, captures = self.store.keys, dict[str, Capture]()
        for site in self.sites:
            key, state = keys.key_of(site), dict(read["state", site])
            x = read[key][X]
            if key[0] == "boundary":
                x = to_tokens(x, keys.backbone.spec.sites[site], stop - start, keys.who(site))
            else:
                state[ENTRY] = read["boundary", keys.place(site).step][X]
            captures[site] = Capture(x, state)
        return captures


@dataclass
class Keeping:
    """Writes the tables of a part that are not there yet, as its images pass.

    A `with` block completes them; an exception in it leaves nothing. A disk that cannot be written
    is no error: the run goes on, and nothing more is kept.
    """

    store: ActivationStore
    part: Part
    sites: Sequence[str]
    missing: Sequence[Key]
    why: Mapping[int, str]
    _writers: dict[Key, TableWriter] = field(default_factory=dict)
    _n: int = 0

    def __enter__(self) -> Keeping:
        for key in self.missing:
            fields = self.store.keys.fields(key, self.part, False)
            self._writers[key] = TableWriter(self.store.store, fields)
        return self

    def append(self, first: int, captures: Mapping[str, Capture]) -> None:
        """Keep the activations of images that stand in the segment from `first` on."""
        if not self._writers:
            return
        n = len(next(iter(captures.values())).acts_btd)
        self._n += n
        tensors = self._tensors(captures)
        try:
            for key, writer in self._writers.items():
                writer.append(np.arange(first, first + n), tensors[key])
        except WriteError as error:
            self._drop()
            self.store.give_up(error)

    def _tensors(self, captures: Mapping[str, Capture]) -> dict[Key, dict[str, Tensor]]:
        tensors: dict[Key, dict[str, Tensor]] = {}
        for site in self.sites:
            capture, key = captures[site], self.store.keys.key_of(site)
            x, state = capture.acts_btd, dict(capture.state)
            if key[0] == "boundary":
                x = from_tokens(
                    x, self.store.keys.backbone.spec.sites[site], self.store.keys.who(site)
                )
            else:
                tensors["boundary", self.store.keys.place(site).step] = {X: state.pop(ENTRY)}
            tensors |= {key: {X: x}, ("state", site): state}
        return tensors

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._complete()
        except WriteError as unwritable:
            self.store.give_up(unwritable)
        finally:
            self._drop()

    def _complete(self) -> None:
        some = self._n < self.part.n
        start = self.part.start
        here = range(start, start + self.part.n)
        left_out = {place - start: why for place, why in self.why.items() if place in here}
        for key, writer in self._writers.items():
            fields = self.store.keys.fields(key, self.part, some)
            writer.complete(fields, left_out if some else {})

    def _drop(self) -> None:
        for writer in self._writers.values():
            writer.drop()
        self._writers = {}


def _flags(left_out: bool) -> tuple[bool, ...]:
    return (False, True) if left_out else (False,)
