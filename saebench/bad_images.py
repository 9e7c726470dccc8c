"""Images that did not decode and were left out: counted, named, and kept in a list.

`<out>/_bad_images/<dataset>.csv`: split, id, why. A row of results says how many of its images were
left out (`n_skipped`); this list says which. It is written line by line as they come, so that it
holds what was met before a run was broken off.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from saebench.atomic import unwritable
from saebench.data import Dataset

NAMED = 5  # images that are named as they come; all are in the list
_HEADER = ("split", "id", "why")


class BadImages:
    """The bad images of one dataset, met by this run and by earlier ones into the same folder."""

    def __init__(self, out: Path, dataset: Dataset, say: Callable[[str], None]) -> None:
        self.path = out / "_bad_images" / f"{dataset.spec.name}.csv"
        self.dataset, self.say = dataset, say
        self._met: set[tuple[str, str]] = set()
        self._listed: set[tuple[str, str]] | None = None  # once there is one to list

    def add(self, split: str, row: int, why: str) -> None:
        """Note an image. One that was met before, in another pass or wave, counts once.

        Errors: WriteError.
        """
        key = (split, self.dataset.manifest(split).ids[row])
        if key in self._met:
            return
        self._met.add(key)
        if len(self._met) <= NAMED:
            self.say(f"left out: {why}")
        if self._listed is None:
            self._listed = self._read()
        if key not in self._listed:
            self._listed.add(key)
            self._write((*key, why))

    def report(self) -> None:
        """Say how many there were, and where they are listed."""
        if n := len(self._met):
            images = "1 image" if n == 1 else f"{n} images"
            self.say(f"{images} of {self.dataset.spec.name} left out: {self.path}")

    def _read(self) -> set[tuple[str, str]]:
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                return {(row["split"], row["id"]) for row in csv.DictReader(file)}
        except (OSError, KeyError, UnicodeDecodeError, csv.Error):
            return set()  # a list for people: what cannot be read is listed again

    def _write(self, line: tuple[str, ...]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                writer.writerow(_HEADER)
            writer.writerow(line)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text.getvalue())  # in one piece: another run may write beside this one
        except OSError as error:
            raise unwritable(self.path, error) from error


def consecutive(places: np.ndarray) -> Iterator[slice]:
    """Slices of an ascending array in which each value is one more than the last."""
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    edges = [0, *breaks.tolist(), len(places)]
    for start, stop in pairwise(edges):
        yield slice(start, stop)
