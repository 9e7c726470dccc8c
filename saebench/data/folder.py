"""Image files in folders: `<root>/<split>/<class>/…/<image>`, or listed in a table.

Hidden files and folders are skipped, and so is whatever has not the suffix of an image file. Links
are followed. A table (`[folder] labels`) is a CSV file below the root with a line for each image:

- where it has a column `split`, or the entry a holdout, its lines are the images, by their path
  below the root;
- else it labels files of the split folders, by their path below the split folder or the root, with
  or without suffix. A file it does not list has the class of its folder, so that ImageNet as Kaggle
  has it (a flat `val/` and a table) needs nothing moved.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saebench.data.access import Access
from saebench.data.decode import decode_file
from saebench.data.forms import ALL, Column, Form, Listing
from saebench.data.listings import Listed, remembered
from saebench.data.locate import Places, contents, root_of
from saebench.data.scan import scan
from saebench.data.table import Table, TableForm, coded, labels_of
from saebench.data.texts import Paths, Texts
from saebench.errors import DataError, SpecError
from saebench.specs import DatasetSpec, FolderForm

if TYPE_CHECKING:
    from PIL.Image import Image


def open_folder(spec: DatasetSpec, form: FolderForm, access: Access, places: Places) -> Form | None:
    """The folder form of an entry; None, noted in `places`, where it is not there."""
    if form.caption is not None and not form.labels:
        raise SpecError(
            f"{spec.path or spec.name}: [folder] caption = '{form.caption}' is a column of a table",
            'name the table too:  labels = "….csv"',
        )
    root = root_of("folder", form.root, spec, access, places)
    if root is None:
        return None
    table = None
    if form.labels:
        path = root / form.labels
        if not path.is_file():
            places.add("folder", path, f"no such table; there is: {contents(root)}")
            return None
        table = Table.read(path, form)
    if table is not None and (spec.holdout or table.splits):
        return TableForm(spec, form, root, table)
    folder = Folder(spec, form, root, table)
    if not folder.splits:
        wanted = " or ".join(f"{_below(path, root)}/" for path in folder.folders.values())
        places.add("folder", root, f"no {wanted} in it; there is: {contents(root)}")
        return None
    return folder


class Folder(Form):
    """One folder a split, one folder a class below it.

    folders: split -> where it should be. skipped: split -> suffix -> how many files were left out.
    """

    def __init__(
        self, spec: DatasetSpec, form: FolderForm, root: Path, table: Table | None
    ) -> None:
        self.root = self._root = root
        self.table = table
        if spec.holdout:
            self.folders = {ALL: root / form.splits.get(ALL, "")}
        else:
            named = form.splits or {split: split for split in (spec.train, spec.test)}
            self.folders = {split: root / folder for split, folder in named.items()}
        self.splits = tuple(split for split, path in self.folders.items() if path.is_dir())
        self.skipped: dict[str, Counter[str]] = {}
        self._files: dict[str, Paths] = {}
        self.has_captions = table is not None and table.captions is not None

    def missing(self, split: str) -> str:
        if split in self.skipped:
            others = [f"{count} {suffix}" for suffix, count in self.skipped[split].most_common(5)]
            return f"in {self.folders[split]} is no image file" + (
                f" ({', '.join(others)})" if others else ""
            )
        if split in self.folders:
            what = f"there is no folder {self.folders[split]}"
        else:
            what = f"its splits: {', '.join(self.folders)}"
        return f"{what}; in {self._root} there is: {contents(self._root)}"

    def listing(self, split: str) -> Listing:
        files = self._listed(split)
        if self.table is None:
            return Listing(files, self._classes(split, files))
        return Listing(files, self._labelled(split, files, self.table))

    def read(self, split: str, row: int) -> Image:
        return decode_file(self.folders[split] / self._listed(split)[row])

    def _listed(self, split: str) -> Paths:
        if split not in self._files:
            top = self.folders[split]
            arrays = remembered({"form": "folder", "top": str(top.absolute())}, lambda: _list(top))
            self._files[split] = Paths(
                list(Texts(arrays["folders"])), arrays["folder_of"], Texts(arrays["names"])
            )
            suffixes, counts = Texts(arrays["skipped"]), arrays["skipped_counts"].tolist()
            self.skipped[split] = Counter(dict(zip(suffixes, counts, strict=True)))
        return self._files[split]

    def _classes(self, split: str, files: Paths) -> Column:
        """The class of a file is the first folder below the split."""
        folders = list(files.folders)
        if "" in folders:
            rows = np.flatnonzero(files.folder_of == folders.index(""))
            raise DataError(
                f"{self.folders[split]}: {len(rows)} of {len(files)} images are in no class folder,"
                f" the first is '{files[int(rows[0])]}'",
                "put them into a folder named after their class, or list them in a table: "
                "[folder] labels",
            )
        column = coded([folder.partition("/")[0] for folder in folders])
        return Column(column.values[files.folder_of], column.names)

    def _labelled(self, split: str, files: Paths, table: Table) -> Column:
        """The table's label of a file, else its class folder."""
        names: list[str | None] = []
        for path, line in zip(files, self._lines(split, files, table), strict=True):
            if line is not None:
                names.append(table.labels[line])
            else:
                names.append(path.partition("/")[0] if "/" in path else None)
        if None in names:
            raise DataError(
                f"{self.folders[split]}: {names.count(None)} of {len(names)} images are not in "
                f"{table.path}, the first is '{files[names.index(None)]}'",
                "add them to the table, or move them out of the folder",
            )
        return labels_of(
            [name for name in names if name], lambda row: f"{table.path}: '{files[row]}'"
        )

    def _lines(self, split: str, files: Paths, table: Table) -> Iterator[int | None]:
        """The table's line of each file; None where it has none."""
        by_path = {name: line for line, name in enumerate(table.files)}
        below = _below(self.folders[split], self._root)
        for path in files:
            stem = os.path.splitext(path)[0]
            lines = (
                by_path.get(name) for name in (path, stem, f"{below}/{path}", f"{below}/{stem}")
            )
            yield next((line for line in lines if line is not None), None)

    def captions(self, split: str) -> Sequence[str]:
        table, files = self.table, self._listed(split)
        if table is None or (captions := table.captions) is None:
            return ()
        lines = self._lines(split, files, table)
        return Texts.of("" if line is None else captions[line] for line in lines)


def _below(path: Path, root: Path) -> str:
    """A split's folder as seen from the root, or as it is where it lies elsewhere."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _list(top: Path) -> Listed:
    """Every image below a split's folder, sorted by folder and name."""
    found = scan(top)
    sizes = [len(names) for names in found.folders.values()]
    names = [name for names in found.folders.values() for name in names]
    arrays = {
        "folders": _texts(list(found.folders), top).data,
        "folder_of": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        "names": _texts(names, top).data,
        "skipped": _texts(list(found.skipped), top).data,
        "skipped_counts": np.array(list(found.skipped.values()), dtype=np.int64),
    }
    return Listed(arrays, found.stamps, len(names))


def _texts(names: Sequence[str], top: Path) -> Texts:
    try:
        return Texts.of(names)
    except UnicodeEncodeError:
        bad = next(name for name in names if not name.isprintable())
        raise DataError(
            f"{top}: the name {bad!a} is not valid UTF-8", "rename the file or folder"
        ) from None
