"""Images that did not decode and were left out: counted, named, and kept in a list.

`<out>/_bad_images/<dataset>.csv`: split, id, why. A row of results says how many of its images were
left out (`n_skipped`); this list says which.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

from saebench.atomic import write_bytes
from saebench.data import Dataset

NAMED = 5  # images that are named as they come; all are in the list


class BadImages:
    """The bad images of one dataset, those of earlier runs into the same folder included."""

    def __init__(self, out: Path, dataset: Dataset, say: Callable[[str], None]) -> None:
        self.path = out / "_bad_images" / f"{dataset.spec.name}.csv"
        self.dataset, self.say = dataset, say
        self._found: dict[tuple[str, str], str] = {}

    def add(self, split: str, row: int, why: str) -> None:
        """Note an image. One that was met before, in another pass or wave, counts once."""
        key = (split, self.dataset.manifest(split).ids[row])
        if key in self._found:
            return
        self._found[key] = why
        if len(self._found) <= NAMED:
            self.say(f"left out: {why}")

    def report(self) -> None:
        """Say how many there were, and write the list. Errors: WriteError."""
        if not self._found:
            return
        everything = {**self._earlier(), **self._found}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["split", "id", "why"])
        writer.writerows([*key, why] for key, why in sorted(everything.items()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, text.getvalue().encode())
        n = len(self._found)
        images = "1 image" if n == 1 else f"{n} images"
        self.say(f"{images} of {self.dataset.spec.name} left out: {self.path}")

    def _earlier(self) -> dict[tuple[str, str], str]:
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                return {(row["split"], row["id"]): row["why"] for row in csv.DictReader(file)}
        except (OSError, KeyError, UnicodeDecodeError, csv.Error):
            return {}  # a list for people: what cannot be read is written anew
