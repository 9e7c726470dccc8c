"""A dataset in the form of the Hugging Face hub: rows in Parquet files, read with `datasets`.

The first of these that is there is read:

    repo as a folder, absolute or relative to the entry's file
    <data root>/<dataset name>, where Parquet files lie in it
    repo as owner/name on the hub, at the commit that is locked (`saebench.hub`)

A split's rows are an Arrow file that is mapped into memory (`saebench.data.hub_rows`). Keys and
labels are read column by column, so that no image is touched before it is wanted. Encoded bytes go
to `saebench.data.decode`, as in every other form.

A row's key is, of `[hub] id`, that column; without it the path of its image; and where no image has
one, or with `id = "row"`, the row's number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.data.access import Access
from saebench.data.decode import BadImage, decode, decode_file
from saebench.data.forms import ALL, Form, Listing
from saebench.data.hub_columns import ROW, captions_of, column_of, keys_of, labels_of
from saebench.data.hub_files import Files, FolderFiles, RepositoryFiles
from saebench.data.hub_rows import all_rows, are_kept, first_rows
from saebench.data.locate import Places
from saebench.errors import DataError
from saebench.specs import DatasetSpec, HubForm

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image


_SPLITS = ("train", "test", "validation", "val")


def open_hub(spec: DatasetSpec, form: HubForm, access: Access, places: Places) -> Form | None:
    """The hub form of an entry; None, noted in `places`, where it is not there.

    Errors: DataError where it is there and cannot be read, or the hub refuses.
    """
    files = _files(spec, form, access, places)
    if files is None:
        return None
    hub = Hub(spec, form, access, files)
    if not access.download and not all(map(hub.is_here, hub.splits)):
        _note(spec, form, places)
        return None
    return hub


def _note(spec: DatasetSpec, form: HubForm, places: Places) -> None:
    places.add("hub", form.repo, f"not fetched yet:  saebench fetch {spec.name}")


def _files(spec: DatasetSpec, form: HubForm, access: Access, places: Places) -> Files | None:
    folder = Path(spec.path).parent / Path(form.repo).expanduser()
    if folder.is_dir():
        return FolderFiles(spec.name, folder, form.config)
    if form.repo.count("/") != 1 or form.repo.startswith((".", "/", "~")):
        places.add("hub", folder, "there is no such folder")
        return None
    if access.root is not None:
        folder = access.root / spec.name
        # Not all the way down: an image folder may lie there, of a million files.
        patterns = ("*.parquet", "*/*.parquet", *(f"*/{s}/*.parquet" for s in _SPLITS))
        if any(next(folder.glob(pattern), None) for pattern in patterns):
            return FolderFiles(spec.name, folder, form.config)
        places.add("hub", folder, "no Parquet files in it")
    try:
        return _repository(spec, form, access, places)
    except DataError as error:
        if not places.lines:
            raise
        raise DataError(
            f"{error.what}\nIt was looked for before in\n{places}", error.hint
        ) from error


def _repository(
    spec: DatasetSpec, form: HubForm, access: Access, places: Places
) -> RepositoryFiles | None:
    from saebench import lock
    from saebench.hub import is_commit, resolve_revision

    if not access.download:
        asked = lock.Asked("dataset", form.repo, form.revision or "")
        given = form.revision if form.revision and is_commit(form.revision) else ""
        commit = given or lock.commit_of(asked)
        if not RepositoryFiles.index_path(form.repo, form.config, commit or "none").is_file():
            _note(spec, form, places)
            return None
    commit = resolve_revision(form.repo, form.revision, kind="dataset", by=spec.name)
    return RepositoryFiles(spec.name, form.repo, form.config, commit)


class Hub(Form):
    """Rows of a hub dataset. Splits that are neither fitted nor measured on are not listed."""

    def __init__(self, spec: DatasetSpec, form: HubForm, access: Access, files: Files) -> None:
        self.spec, self.form, self.access, self.files = spec, form, access, files
        self.root, self.revision = files.root, files.asked.commit
        there = files.index.splits
        # Split -> the splits of the hub that it is made of.
        self.made_of: Mapping[str, tuple[str, ...]]
        if spec.holdout:
            pool = form.splits.get(ALL)
            self.made_of = {ALL: (pool,) if pool else tuple(there)}
        else:
            wanted = dict.fromkeys((spec.train, spec.test, *form.splits))
            self.made_of = {name: (form.splits.get(name, name),) for name in wanted}
        self.splits = tuple(n for n, parts in self.made_of.items() if set(parts) <= set(there))
        self._rows: dict[str, datasets.Dataset] = {}
        self.has_captions = form.caption is not None
        if not self.splits:
            raise DataError(
                f"{spec.name}: {files.asked.place} has none of the splits "
                f"{', '.join(part for parts in self.made_of.values() for part in parts)}",
                self.missing(spec.test),
            )

    def missing(self, split: str) -> str:
        there = ", ".join(self.files.index.splits) or "none"
        return f'it has {there}; say which is which:  [hub.splits]  {split} = "…"'

    def streams(self, split: str) -> bool:
        """Whether only the first rows of a split are taken, as they come."""
        streaming = self.form.streaming
        return streaming if isinstance(streaming, bool) else split in streaming

    def listing(self, split: str) -> Listing:
        rows, where = self.rows(split), f"dataset '{self.spec.name}', split '{split}'"
        tops = (split, *self.made_of[split])
        keys = keys_of(rows, self.form.image, self.form.id, self.files, tops, where)
        label = labels_of(rows, self.form.label, where)
        if self.streams(split) and label.names and not (label.ordered or self.spec.classes):
            raise DataError(
                f"{where} is a stream, and its labels are names: which there are, and so their "
                "numbers, would change with the limit",
                'write them into the entry, in label order:  classes = ["…", "…"]',
            )
        return Listing(
            keys,
            label,
            {level: labels_of(rows, name, where) for level, name in self.form.levels.items()},
            stratified=not self.streams(split),
        )

    def captions(self, split: str) -> Sequence[str]:
        assert self.form.caption is not None
        where = f"dataset '{self.spec.name}', split '{split}'"
        return captions_of(self.rows(split), self.form.caption, where)

    def read(self, split: str, row: int) -> Image:
        value: Any = column_of(self.rows(split), self.form.image, "")[row].as_py()
        data, path = (value["bytes"], value["path"]) if isinstance(value, dict) else (value, None)
        if isinstance(data, bytes):
            return decode(data, f"row {row}")
        # A row of somebody else's may name any file: only the dataset's own are opened.
        if path and self.files.own(path):
            return decode_file(Path(path))
        raise BadImage(f"row {row} holds no image")

    def rows(self, split: str) -> datasets.Dataset:
        """The rows of a split, mapped into memory. Errors: DataError."""
        if split not in self._rows:
            parts = self.made_of[split]
            if self.streams(split):
                n = self.access.first.get(split)
                if n is None:
                    option = "--limit" if split == self.spec.test else "--train-limit"
                    raise DataError(
                        f"dataset '{self.spec.name}', split '{split}' is a stream, and has no end",
                        f"say how many images to take of it:  {option} 2000",
                    )
                self._rows[split] = first_rows(self.files, parts, self._columns(), n)
            else:
                self._rows[split] = all_rows(self.files, parts)
        return self._rows[split]

    def is_here(self, split: str) -> bool:
        """Whether the rows of a split need no download."""
        parts = self.made_of[split]
        if self.streams(split):
            n = self.access.first.get(split, 1)
            return are_kept(self.files, parts, self._columns(), n)
        return all(self.files.here(part) is not None for part in parts)

    def _columns(self) -> list[str]:
        """What is kept of a stream."""
        form = self.form
        named = [form.image, form.label, *form.levels.values()]
        if form.id is not None and form.id != ROW:
            named.append(form.id)
        if form.caption is not None:
            named.append(form.caption)
        return sorted({name.split(".")[0] for name in named})

    def fetch(self) -> str:
        done = []
        for split in self.splits:
            if self.streams(split) and split not in self.access.first:
                done.append(f"{split} is streamed when it is run")
            else:
                done.append(f"{split} {len(self.rows(split)):,} images")
        return f"{self.files.asked.place}: {', '.join(done)}"
