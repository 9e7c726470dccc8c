"""`source = "images"`: a collection of images as folders, tar shards or a hub dataset.

The first of `[folder]`, `[tar]` and `[hub]` that the entry has and that is there on this machine is
read; an entry with none of them has `[folder]`. Whatever the form, a row becomes

    id      group 1 of `id_pattern`, searched in the row's key; without a pattern the split, `/`,
            and the key without the suffix of an image file
    label   the number of its class in the class list (`saebench.data.classes`)

With `holdout`, all images are one pool in class-stratified order (`saebench.data.manifest`): the
first round(holdout * n) are the test split, the others the train split, and ids have no split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from saebench.data.access import Access
from saebench.data.captions import all_there
from saebench.data.classes import (
    ClassList,
    Listed,
    class_list,
    needs_names,
    numbers,
    own_numbers,
    plain,
)
from saebench.data.dataset import Dataset
from saebench.data.forms import ALL, Column, Form, Listing
from saebench.data.locate import Places
from saebench.data.manifest import Manifest
from saebench.data.scan import SUFFIXES
from saebench.data.texts import Picked
from saebench.errors import DataError, SpecError
from saebench.specs import DatasetSpec, FolderForm

if TYPE_CHECKING:
    from PIL.Image import Image


class Images(Dataset):
    """A collection in one form. Errors: DataError where no form is there."""

    decodes = True

    def __init__(self, spec: DatasetSpec, access: Access) -> None:
        super().__init__(spec)
        self.form = open_form(spec, access)
        self.resolved_revision = self.form.revision
        self.has_captions = self.form.has_captions
        self.splits = (spec.train, spec.test, ALL) if spec.holdout else self.form.splits
        self._listings: dict[str, Listing] = {}
        self._captions: dict[str, Sequence[str]] = {}
        self._rows: dict[str, np.ndarray] = {}  # of a held-out split: its rows in the pool

    # Names: made when they are asked for, since that may list (and download) every split

    @cached_property
    def _classes(self) -> ClassList:
        if not needs_names(self.spec):
            return class_list(self.spec, (), self.form.root)
        columns = [self._listing(split).label for split in self.form.splits]
        if not self.spec.classes and (own := _own_order(columns)):
            return Listed(own)
        return class_list(self.spec, _names(columns), self.form.root)

    @cached_property
    def _own_levels(self) -> Mapping[str, ClassList]:
        """Of the levels the form itself lists: the names of each, over all splits."""
        listed = next(iter(self._listings.values()), None) or self._listing(self.form.splits[-1])
        if not listed.levels:  # then no split has any
            return {}
        found: dict[str, list[Column]] = {}
        for split in self.form.splits:
            for level, column in self._listing(split).levels.items():
                found.setdefault(level, []).append(column)
        return {
            level: _found(f"dataset '{self.spec.name}', '{level}'", columns)
            for level, columns in found.items()
        }

    @cached_property
    def class_names(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._classes.names

    @cached_property
    def label_names(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> Mapping[str, tuple[str, ...]]:
        return {
            **{level: names for level, (names, _) in self._classes.levels.items()},
            **{level: classes.names for level, classes in self._own_levels.items()},
        }

    @property
    def text_names(self) -> Mapping[str, tuple[str, ...]]:
        return self._classes.texts

    # Rows

    def manifest(self, split: str) -> Manifest:
        if split not in self.splits:
            own = self.spec.holdout is not None
            raise DataError(
                f"dataset '{self.spec.name}' has no split '{split}'",
                f"its splits: {', '.join(self.splits)}" if own else self.form.missing(split),
            )
        return super().manifest(split)

    def captions(self, split: str) -> Sequence[str]:
        """Errors: DataError for images without one."""
        if self.has_captions and split not in self._captions:
            ids = self.manifest(split).ids
            if self.spec.holdout and split != ALL:
                found = Picked(self.form.captions(ALL), self._rows[split])
            else:
                found = self.form.captions(split)
            all_there(found, ids, f"dataset '{self.spec.name}', split '{split}'")
            self._captions[split] = found
        return self._captions.get(split, ())

    def fetch(self) -> str:
        return self.form.fetch()

    def _build_manifest(self, split: str) -> Manifest:
        if self.spec.holdout and split != ALL:
            return self._held_out(split)
        listing = self._listing(split)
        where = f"dataset '{self.spec.name}', split '{split}'"
        labels = _labels(self._classes, listing.label, where)
        levels = {level: values[labels] for level, (_, values) in self._classes.levels.items()}
        for level, column in listing.levels.items():
            levels[level] = _labels(self._own_levels[level], column, f"{where}, '{level}'")
        prefix = "" if self.spec.holdout else f"{split}/"
        ids = make_ids(listing.keys, self.spec, prefix, where)
        return Manifest(self.spec.name, split, ids, labels, levels, listing.stratified)

    def _held_out(self, split: str) -> Manifest:
        pool = self.manifest(ALL)
        order, share = pool.order(), self.spec.holdout or 0
        cut = round(share * len(order))
        if not 0 < cut < len(order):
            nearest = (1 if cut == 0 else cut - 1) / len(order)
            raise DataError(
                f"dataset '{self.spec.name}': holdout = {share} makes {cut} of {len(order)} images "
                f"the test split, and leaves {len(order) - cut} to train on",
                f"write holdout = {nearest:.6g}" if len(order) > 1 else "add images, to cut two",
            )
        rows = np.sort(order[:cut] if split == self.spec.test else order[cut:])
        self._rows[split] = rows
        return Manifest(
            self.spec.name,
            split,
            tuple(pool.ids[row] for row in rows.tolist()),
            pool.labels[rows],
            {level: values[rows] for level, values in pool.levels.items()},
            pool.stratified,
        )

    def _decode(self, split: str, index: int) -> Image:
        if self.spec.holdout and split != ALL:
            return self.form.read(ALL, int(self._rows[split][index]))
        return self.form.read(split, index)

    def _listing(self, split: str) -> Listing:
        if split not in self._listings:
            listing = self.form.listing(split)
            if not len(listing.keys):
                raise DataError(
                    f"dataset '{self.spec.name}', split '{split}' has no images",
                    self.form.missing(split),
                )
            self._listings[split] = listing
        return self._listings[split]


def open_form(spec: DatasetSpec, access: Access) -> Form:
    """The first form of an entry that is there. Errors: DataError naming every place looked at."""
    forms: dict[str, Callable[[Places], Form | None]] = {}
    nothing = spec.folder is None and spec.tar is None and spec.hub is None
    if spec.folder is not None or nothing:
        from saebench.data.folder import open_folder

        forms["folder"] = lambda places: open_folder(
            spec, spec.folder or FolderForm(), access, places
        )
    if (tar := spec.tar) is not None:
        from saebench.data.tar import open_tar

        forms["tar"] = lambda places: open_tar(spec, tar, access, places)
    if (hub := spec.hub) is not None:
        from saebench.data.hub import open_hub

        forms["hub"] = lambda places: open_hub(spec, hub, access, places)
    places = Places()
    for open_one in forms.values():
        if (form := open_one(places)) is not None:
            return form
    raise DataError(
        f"dataset '{spec.name}' is not there. Looked for\n" + str(places),
        f"put it into one of these places, or name the folder that holds '{spec.name}' with "
        "--data-root or SAEBENCH_DATA",
    )


def make_ids(keys: Sequence[str], spec: DatasetSpec, prefix: str, where: str) -> tuple[str, ...]:
    """An id for each key, as the module says. Errors: DataError, SpecError for a bad pattern."""
    if not spec.id_pattern:
        return tuple(prefix + plain(without_suffix(key)) for key in keys)
    try:
        pattern = re.compile(spec.id_pattern)
    except re.error as error:
        raise SpecError(f"{spec.path or spec.name}: id_pattern: {error}") from None
    if pattern.groups < 1:
        raise SpecError(
            f"{spec.path or spec.name}: id_pattern has no group",
            "put brackets around the part that is the id:  id_pattern = '([^/]+)\\.jpg'",
        )
    search = pattern.search
    ids = tuple(plain(match[1] or "") if (match := search(key)) else "" for key in keys)
    if not all(ids):
        unnamed = [key for key, name in zip(keys, ids, strict=True) if not name]
        raise DataError(
            f"{where}: the entry's id_pattern finds no id in {len(unnamed)} of {len(ids)} "
            f"paths, the first is '{unnamed[0]}'",
            f"id_pattern is {spec.id_pattern!r}: are these the dataset's own files?",
        )
    return ids


def without_suffix(key: str) -> str:
    """A key without the suffix of an image file."""
    stem, dot, suffix = key.rpartition(".")
    return stem if stem and f"{dot}{suffix}".lower() in SUFFIXES else key


def _names(columns: Sequence[Column]) -> list[str | int]:
    """Everything the labels of these columns are called, each once."""
    found: dict[str | int, None] = {}
    for column in columns:
        if column.names is None:
            found.update(dict.fromkeys(np.unique(column.values).tolist()))
        else:
            found.update(dict.fromkeys(column.names))
    return list(found)


def _own_order(columns: Sequence[Column]) -> tuple[str, ...] | None:
    """The names that the dataset itself numbers, the same in every split; None: it does not."""
    orders = {column.names if column.ordered else None for column in columns}
    return orders.pop() if len(orders) == 1 else None


def _found(where: str, columns: Sequence[Column]) -> ClassList:
    from saebench.data.classes import Found

    own = _own_order(columns)
    return Listed(own) if own else Found(_names(columns), where)


def _labels(classes: ClassList, column: Column, where: str) -> np.ndarray:
    """[n] int64: the labels of a column's rows."""
    if column.names is not None:
        number = own_numbers if column.ordered else numbers
        return number(classes, column.names, where)[column.values]
    values, places = np.unique(column.values, return_inverse=True)
    return numbers(classes, values.tolist(), where)[places]
