"""A collection of images as tar shards, in WebDataset layout (`saebench.data.tarrows`).

Shards are named by patterns with `*`, and with braces as WebDataset has them: `{0000..1023}`,
`{a,b}`. What braces name without `*` has to be there. An index is made once, of headers alone;
an image is then read from its place, by a file opened for it, so that processes share nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob, has_magic
from itertools import product
from pathlib import Path
from re import split as split_re
from typing import TYPE_CHECKING

import numpy as np

from saebench.data.access import Access
from saebench.data.captions import texts_of
from saebench.data.decode import decode
from saebench.data.forms import ALL, Column, Form, Listing
from saebench.data.listings import THREADS, Listed, remembered, stamp_of
from saebench.data.locate import Places, contents, root_of
from saebench.data.table import coded, labels_of
from saebench.data.tarrows import rows_of
from saebench.data.texts import Texts
from saebench.errors import DataError, SpecError
from saebench.specs import DatasetSpec, TarForm

if TYPE_CHECKING:
    from PIL.Image import Image

USUAL = ("{split}.tar", "{split}-*.tar", "{split}_*.tar", "{split}/*.tar")
"""Where the shards of a split are looked for when the entry does not say."""
INDEX = 2  # raised when an index of the same shards would hold other rows


def open_tar(spec: DatasetSpec, form: TarForm, access: Access, places: Places) -> Form | None:
    """The tar form of an entry; None, noted in `places`, where it is not there.

    Errors: DataError where some of the shards that the entry names are missing.
    """
    root = root_of("tar", form.root, spec, access, places)
    if root is None:
        return None
    found = Tar(spec, form, root)
    if not found.splits:
        patterns = " or ".join(found.patterns.values())
        places.add("tar", root, f"no {patterns} in it; there is: {contents(root)}")
        return None
    return found


class Tar(Form):
    """`patterns`: split -> its shards as the entry has them. `shards`: split -> their paths."""

    def __init__(self, spec: DatasetSpec, form: TarForm, root: Path) -> None:
        self.root = self._root = root
        self._label, self._caption = form.label, form.caption
        self.has_captions = form.caption is not None
        self._known = bool(spec.classes)
        if form.label not in ("cls", "folder") and not form.label.startswith("json:"):
            raise SpecError(
                f"{spec.path or spec.name}: [tar] label is '{form.label}'",
                'it is "cls", "json:<key>" or "folder"',
            )
        if form.caption is not None and (
            form.label == "folder"
            or not (form.caption == "txt" or form.caption.startswith("json:"))
        ):
            raise SpecError(
                f"{spec.path or spec.name}: [tar] caption is '{form.caption}', and label "
                f"'{form.label}'",
                'a caption is "txt" or "json:<key>", of samples, whose label is "cls" or '
                '"json:<key>"',
            )
        wanted = (ALL,) if spec.holdout else tuple(form.splits) or (spec.train, spec.test)
        self.patterns = {split: form.splits.get(split) or _usual(split, root) for split in wanted}
        shards = {split: shards_of(root, pattern) for split, pattern in self.patterns.items()}
        self.shards = {split: paths for split, paths in shards.items() if paths}
        self.splits = tuple(self.shards)
        self._indices: dict[str, dict[str, np.ndarray]] = {}

    def missing(self, split: str) -> str:
        if split in self.shards:
            return f"no image is in {self.patterns[split]}"
        pattern = self.patterns.get(split)
        what = f"no {pattern} is there" if pattern else f"its splits: {', '.join(self.patterns)}"
        return f"{what}; in {self._root} there is: {contents(self._root)}"

    def listing(self, split: str) -> Listing:
        index = self._index(split)
        keys, names = Texts(index["keys"]), list(Texts(index["names"]))
        if self._label == "folder":
            if not self._known:
                self._check_classes()
            column = coded(names)  # as in a folder: names, even where they are numbers
        else:

            def whose(name: int) -> str:
                return f"{self.patterns[split]}: '{keys[int((index['labels'] == name).argmax())]}'"

            column = labels_of(names, whose)
        return Listing(keys, Column(column.values[index["labels"]], column.names))

    def captions(self, split: str) -> Sequence[str]:
        return Texts(self._index(split)["captions"])

    def _check_classes(self) -> None:
        """Errors: DataError where a folder that was packed as a whole would be the one class."""
        indices = [self._index(split) for split in self.splits]
        names = {name for index in indices for name in Texts(index["names"])}
        if len(names) != 1:
            return
        (only,) = names
        keys = [key for index in indices for key in Texts(index["keys"])[:1]]
        raise DataError(
            f"{self._root}: all images of its shards are in the folder '{only}', as '{keys[0]}', "
            "and would be of one class",
            f"if it was packed as a whole, call the shard {only}.tar, or pack what is in it:  "
            f"tar -C {only} -cf x.tar .",
        )

    def read(self, split: str, row: int) -> Image:
        index = self._index(split)
        shard = self.shards[split][int(index["shard"][row])]
        offset, size = int(index["offset"][row]), int(index["size"][row])
        with shard.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        return decode(data, f"{shard}, bytes {offset} to {offset + size}")

    def _index(self, split: str) -> dict[str, np.ndarray]:
        if split not in self._indices:
            shards = self.shards[split]
            # None: each shard's own name.
            above = (split, _literal(self.patterns[split]) or None)
            what = {
                "form": "tar",
                "index": INDEX,
                "above": above,
                "label": self._label,
                "shards": [str(path.absolute()) for path in shards],
            }
            if self._caption is not None:  # so that an index without them serves who asks for none
                what["caption"] = self._caption
            self._indices[split] = remembered(
                what, lambda: _list(shards, self._label, above, self._caption)
            )
        return self._indices[split]


def shards_of(root: Path, pattern: str) -> list[Path]:
    """The shards a pattern names, in the order of its braces, each `*` sorted.

    Errors: DataError where some of those that braces name are there and some are not.
    """
    named = expand(pattern)
    found = [root / path for one in named for path in sorted(glob(one, root_dir=root))]
    missing = [one for one in named if not has_magic(one) and not (root / one).exists()]
    if found and missing:
        raise DataError(
            f"{len(missing)} of the {len(named)} shards {root / pattern} are missing, the first "
            f"is {missing[0]}",
            "fetch them too; or, to measure on a part of the dataset, write * instead of braces",
        )
    return list(dict.fromkeys(found))


def expand(pattern: str) -> list[str]:
    """`a-{08..10}.{x,y}` -> a-08.x, a-08.y, a-09.x, …: braces as the shell has them, unnested."""
    parts = split_re(r"\{([^{}]*)\}", pattern)
    choices = [[part] if place % 2 == 0 else _choices(part) for place, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(inside: str) -> list[str]:
    first, dots, last = inside.partition("..")
    if dots and first.isdigit() and last.isdigit():
        width = len(first) if first.startswith("0") else 0
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


def _usual(split: str, root: Path) -> str:
    if split == ALL:
        return "*.tar"
    patterns = [pattern.format(split=split) for pattern in USUAL]
    return next((one for one in patterns if shards_of(root, one)), patterns[1])


def _literal(pattern: str) -> str:
    """What the shards of a pattern are all called: `train_mini` of `data/train_mini-*.tar`."""
    return split_re(r"[*?\[{]", os.path.basename(pattern))[0].removesuffix(".tar").rstrip("-_.")


def _list(
    shards: list[Path], label: str, above: Sequence[str | None], caption: str | None
) -> Listed:
    """Every image of some shards, sorted by key."""
    watched = {str(path): stamp_of(str(path)) for path in shards}
    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(lambda path: _shard(path, label, above, caption), shards))
    rows = sorted(
        (key, shard, offset, size, name, place)
        for shard, (part, _) in enumerate(parts)
        for place, (key, offset, size, name) in enumerate(part)
    )
    names: dict[str, int] = {}
    labels = [names.setdefault(row[4], len(names)) for row in rows]
    arrays = {
        "keys": Texts.of(row[0] for row in rows).data,
        "shard": np.array([row[1] for row in rows], dtype=np.int32),
        "offset": np.array([row[2] for row in rows], dtype=np.int64),
        "size": np.array([row[3] for row in rows], dtype=np.int64),
        "labels": np.array(labels, dtype=np.int64),
        "names": Texts.of(names).data,
    }
    if caption is not None:
        arrays["captions"] = Texts.of(parts[row[1]][1][row[5]] for row in rows).data
    return Listed(arrays, watched, len(rows))


def _shard(
    path: Path, label: str, above: Sequence[str | None], caption: str | None
) -> tuple[list[tuple[str, int, int, str]], Texts]:
    """(key, offset, size, label) of each image of a shard, and the captions, in few bytes."""
    rows: list[tuple[str, int, int, str]] = []

    def captions() -> Iterator[str]:
        for row in rows_of(path, label, above, caption):
            rows.append((row.key, row.offset, row.size, row.label))
            yield row.caption

    return rows, texts_of(captions(), lambda place: f"'{rows[place][0]}' in {path}")
