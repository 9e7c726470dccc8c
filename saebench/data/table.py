"""Image files that a table lists: a CSV (or `.tsv`) file with one line for each image."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from saebench.data.captions import texts_of
from saebench.data.decode import decode_file
from saebench.data.forms import ALL, Column, Form, Listing
from saebench.data.texts import Picked, Texts
from saebench.errors import DataError, SpecError
from saebench.specs import DatasetSpec, FolderForm

if TYPE_CHECKING:
    from PIL.Image import Image

SPLIT = "split"
_DIGITS = 18  # of any number that fits 64 bits
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*|nan|NaN", re.ASCII)


@dataclass(frozen=True, eq=False)
class Table:
    """n lines: `files` as paths with `/`, `labels` as they are written, `splits` where it has any.

    captions: '' for a line that has none; None where the entry names no column of them.
    Errors: DataError for a table without lines or without the columns, or a file listed twice.
    """

    path: Path
    files: tuple[str, ...]
    labels: tuple[str, ...]
    splits: tuple[str, ...] | None
    captions: Texts | None = None

    @classmethod
    def read(cls, path: Path, form: FolderForm) -> Table:
        """The columns that a form names."""
        file, label, caption = form.file, form.label, form.caption
        try:
            with path.open(newline="", encoding="utf-8-sig") as text:
                reader = csv.DictReader(text, delimiter="\t" if path.suffix == ".tsv" else ",")
                columns = [name for name in reader.fieldnames or () if name]
                for column in (file, label, caption):
                    if column is not None and column not in columns:
                        raise DataError(
                            f"{path} has no column '{column}', but: {', '.join(columns) or 'none'}",
                            'name its columns in the entry:  [folder] file = "…"  label = "…"'
                            + ('  caption = "…"' if caption else ""),
                        )
                lines = list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} cannot be read: {error}", "write it as CSV in UTF-8") from None
        if not lines:
            raise DataError(f"{path} lists no images", "it needs a line for each image")
        for number, line in enumerate(lines):
            if not line[file] or not line[label]:
                missing = label if line[file] else file
                raise DataError(f"{path}: image {number + 1} has no {missing}")
        files = tuple(PurePosixPath(line[file].replace("\\", "/")).as_posix() for line in lines)
        if len(set(files)) < len(files):
            seen: set[str] = set()
            twice = next(name for name in files if name in seen or seen.add(name))
            raise DataError(f"{path} lists '{twice}' twice", "remove one of the lines")
        splits = tuple(line[SPLIT] or "" for line in lines) if SPLIT in columns else None
        captions = None
        if caption is not None:
            written = (line[caption] or "" for line in lines)
            captions = texts_of(written, lambda number: f"'{files[number]}' in {path}")
        return cls(path, files, tuple(line[label] for line in lines), splits, captions)

    def label_of(self, line: int) -> str:
        """What a message calls the label of a line."""
        return f"{self.path}: '{self.files[line]}'"


class TableForm(Form):
    """Images that a table lists, by split or as one pool. `[folder] splits`: its words for them."""

    def __init__(self, spec: DatasetSpec, form: FolderForm, root: Path, table: Table) -> None:
        if spec.holdout and table.splits:
            raise SpecError(
                f"{spec.path or spec.name}: {table.path} says which image is in which split, and "
                "the entry cuts a holdout",
                "remove `holdout` from the entry",
            )
        self.root = self._root = root
        self.table = table
        if table.splits:
            wanted = form.splits or {split: split for split in (spec.train, spec.test)}
            there = set(table.splits)
            self._words = {split: word for split, word in wanted.items() if word in there}
        else:
            self._words = {ALL: ""}
        self.splits = tuple(self._words)
        self._paths: dict[str, tuple[str, ...]] = {}
        self.has_captions = table.captions is not None

    def missing(self, split: str) -> str:
        words = sorted(set(self.table.splits or ()))
        return f"{self.table.path} has the splits: {', '.join(words)}"

    def listing(self, split: str) -> Listing:
        lines = self._lines(split)
        self._paths[split] = self._found([self.table.files[line] for line in lines])
        # All lines together decide whether labels are numbers, so that splits agree.
        column = labels_of(self.table.labels, self.table.label_of)
        return Listing(self._paths[split], Column(column.values[lines], column.names))

    def captions(self, split: str) -> Sequence[str]:
        assert self.table.captions is not None
        return Picked(self.table.captions, np.array(self._lines(split)))

    def _lines(self, split: str) -> list[int]:
        """The lines of a split, in the order of its rows."""
        lines = range(len(self.table.files))
        if self.table.splits:
            lines = [line for line in lines if self.table.splits[line] == self._words[split]]
        return sorted(lines, key=self.table.files.__getitem__)

    def read(self, split: str, row: int) -> Image:
        if split not in self._paths:
            self.listing(split)
        return decode_file(self._root / self._paths[split][row])

    def _found(self, files: list[str]) -> tuple[str, ...]:
        """The files' paths below the root, with the suffixes they have there."""
        there: dict[str, dict[str, str]] = {}
        paths = []
        for file in files:
            folder, _, name = file.rpartition("/")
            if folder not in there:
                there[folder] = _names(self._root / folder)
            if name not in there[folder]:
                raise DataError(
                    f"{self.table.path} lists '{file}', and {self._root} has no such file",
                    "paths in the table are relative to the root of the entry's [folder]",
                )
            paths.append(f"{folder}/{there[folder][name]}" if folder else there[folder][name])
        return tuple(paths)


def _names(folder: Path) -> dict[str, str]:
    """Name, and name without suffix, -> name of each file of a folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    return {**{os.path.splitext(name)[0]: name for name in names}, **{name: name for name in names}}


def labels_of(labels: Sequence[str], whose: Callable[[int], str]) -> Column:
    """Labels as they are written. They are numbers where all of them are whole numbers.

    whose: says for a message which file and image a label is of. Errors: DataError for numbers
    some of which are no labels: below 0, with a point, of more than 18 digits.
    """
    if not all(map(_NUMBER.fullmatch, labels)):
        return coded(labels)
    for place, label in enumerate(labels):
        if not (label.isascii() and label.isdigit() and len(label) <= _DIGITS):
            raise DataError(
                f"{whose(place)} has the label '{label}', and labels that are numbers are whole "
                f"ones, 0 or above, of {_DIGITS} digits at most",
                "write labels as 0, 1, 2, … or as names of classes, and leave out images that have "
                "none; if these are ids of images, name the column of the labels",
            )
    return Column(np.array([int(label) for label in labels], dtype=np.int64))


def coded(names: Sequence[str]) -> Column:
    """A column of names, each kept once."""
    places: dict[str, int] = {}
    values = [places.setdefault(name, len(places)) for name in names]
    return Column(np.array(values, dtype=np.int64), tuple(places))
