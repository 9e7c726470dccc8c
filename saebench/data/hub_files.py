"""Which files each split of a hub dataset has, and how they get onto this machine.

What belongs to a split is for the `datasets` library to say: the dataset card's `configs`, else the
files' names. Of a repository it is asked once, and the answer kept as JSON, by repository, commit
and configuration, so that a machine without internet knows it too:

    <store>/hub/<owner>--<name>/<commit>/<configuration>.json

The files themselves lie in the hub's own cache (`HF_HOME`), where every other program finds them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saebench import paths
from saebench.atomic import unwritable, write_bytes
from saebench.data.hub_errors import Asked
from saebench.errors import DataError

_DOWNLOADS = 8  # at a time
_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(.*)")


@dataclass(frozen=True)
class Index:
    """The files of a dataset. `reader`: what reads them, as `datasets` calls it (`parquet`).

    splits: split -> paths, relative to the repository or folder. features: as the card has them.
    """

    reader: str
    splits: Mapping[str, tuple[str, ...]]
    features: Mapping[str, Any] | None = None


class Files(ABC):
    """The files of one configuration of a dataset, in a folder or on the hub."""

    asked: Asked
    index: Index
    root: Path | None = None

    @abstractmethod
    def here(self, split: str) -> list[str] | None:
        """Paths of the split's files, or None where they have to be downloaded first."""

    @abstractmethod
    def get(self, split: str) -> list[str]:
        """The same, after downloading what is missing. Errors: DataError."""

    @abstractmethod
    def own(self, path: str) -> str | None:
        """A path on this machine as the dataset calls it; None where the file is not its own."""

    @abstractmethod
    def urls(self, split: str) -> list[str]:
        """What the split is streamed from."""


class FolderFiles(Files):
    """A folder that holds a dataset as the hub has it, or just its Parquet files."""

    def __init__(self, by: str, folder: Path, config: str) -> None:
        self.asked = Asked(by, str(folder))
        self.root = folder
        self.base = folder.resolve()
        with self.asked.explained():
            self.index = _ask(str(self.base), config, None, f"{self.base.as_posix()}/")
        for files in self.index.splits.values():
            _all_shards(files, self.asked)

    def here(self, split: str) -> list[str]:
        return [str(self.base / name) for name in self.index.splits[split]]

    def get(self, split: str) -> list[str]:
        return self.here(split)

    def own(self, path: str) -> str | None:
        return _below(self.base, path)

    def urls(self, split: str) -> list[str]:
        return self.here(split)


class RepositoryFiles(Files):
    """A repository of the hub at one commit."""

    def __init__(self, by: str, repo: str, config: str, commit: str) -> None:
        self.repo, self.commit = repo, commit
        self.asked = Asked(by, f"{repo} at {commit}", repo, commit)
        path = self.index_path(repo, config, commit)
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            splits = {name: tuple(files) for name, files in kept["splits"].items()}
            self.index = Index(kept["reader"], splits, kept["features"])
            return
        self._may_read()
        with self.asked.explained():
            self.index = _ask(repo, config, commit, f"{self._url}/")
        kept = {
            "reader": self.index.reader,
            "splits": self.index.splits,
            "features": self.index.features,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        write_bytes(path, json.dumps(kept, indent=1).encode())

    @staticmethod
    def index_path(repo: str, config: str, commit: str) -> Path:
        """Where the files' names are kept, once they are known."""
        folder = paths.user_store() / "hub" / repo.replace("/", "--") / commit
        return folder / f"{config or 'default'}.json"

    def _may_read(self) -> None:
        """Errors: DataError, where the hub refuses: `datasets` would not say clearly why."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import (
            HfHubHTTPError,
            OfflineModeIsEnabled,
            RemoteEntryNotFoundError,
        )

        card, at = "README.md", self.commit
        with self.asked.explained(), suppress(RemoteEntryNotFoundError):
            # Where nobody listens, all that follows would try for half a minute.
            with suppress(HfHubHTTPError, OfflineModeIsEnabled):
                get_hf_file_metadata(hf_hub_url(self.repo, card, repo_type="dataset", revision=at))
            hf_hub_download(self.repo, card, repo_type="dataset", revision=at)

    @property
    def _url(self) -> str:
        return f"hf://datasets/{self.repo}@{self.commit}"

    def urls(self, split: str) -> list[str]:
        return [f"{self._url}/{name}" for name in self.index.splits[split]]

    def own(self, path: str) -> str | None:
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = f"datasets--{self.repo.replace('/', '--')}"
        return _below(Path(HF_HUB_CACHE, folder, "snapshots", self.commit), path)

    def here(self, split: str) -> list[str] | None:
        found = [self._cached(name) for name in self.index.splits[split]]
        return None if None in found else found  # pyright: ignore[reportReturnType]

    def _cached(self, name: str) -> str | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, name, revision=self.commit, repo_type="dataset")
        return path if isinstance(path, str) else None

    def get(self, split: str) -> list[str]:
        if (found := self.here(split)) is None:
            self._fits(split)
            with self.asked.explained(), ThreadPoolExecutor(_DOWNLOADS) as pool:
                found = list(pool.map(self._download, self.index.splits[split]))
        return found

    def _fits(self, split: str) -> None:
        """Errors: DataError where the disk has no room for the files and for their rows."""
        from huggingface_hub import HfApi
        from huggingface_hub.constants import HF_HUB_CACHE

        names = list(self.index.splits[split])
        with self.asked.explained():
            about = HfApi().get_paths_info(
                self.repo, names, repo_type="dataset", revision=self.commit
            )
        size = {entry.path: getattr(entry, "size", 0) for entry in about}
        missing = sum(bytes for name, bytes in size.items() if self._cached(name) is None)
        needed = missing + sum(size.values())
        place = Path(HF_HUB_CACHE)
        while not place.is_dir():
            place = place.parent
        if needed > (free := shutil.disk_usage(place).free):
            raise DataError(
                f"{self.asked.by}: split '{split}' of {self.asked.place} needs {needed / 1e9:.1f} "
                f"GB of disk, its files and then its rows; in {place} are {free / 1e9:.1f} GB left",
                "let HF_HOME name a folder on another disk; or take the first images only, with "
                f'streaming = ["{split}"]  in [hub]',
            )

    def _download(self, name: str) -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(self.repo, name, repo_type="dataset", revision=self.commit)


def _below(folder: Path, path: str) -> str | None:
    whole = Path(os.path.abspath(path))
    return whole.relative_to(folder).as_posix() if whole.is_relative_to(folder) else None


def _ask(path: str, config: str, commit: str | None, prefix: str) -> Index:
    """What `datasets` makes of a folder or repository; files are given below `prefix`."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(path, config or None, revision=commit)
    except ValueError as error:
        if not config:
            raise
        try:  # without a card that says otherwise, a configuration is its folder
            builder = load_dataset_builder(path, data_dir=config, revision=commit)
        except FileNotFoundError:
            raise error from None
    features = builder.info.features
    found: Mapping[str, Sequence[str]] = builder.config.data_files or {}  # pyright: ignore
    return Index(
        type(builder).__module__.rpartition(".")[2],
        {
            str(split): tuple(f.removeprefix(prefix) for f in files)
            for split, files in found.items()
        },
        dict(features.to_dict()) if features is not None else None,  # pyright: ignore
    )


def _all_shards(files: Sequence[str], asked: Asked) -> None:
    """Errors: DataError where `train-00003-of-00294.parquet` is missing among its kind."""
    numbers: defaultdict[tuple[str, str, str], set[int]] = defaultdict(set)
    for name in files:
        if match := _SHARD.fullmatch(name):
            numbers[match[1], match[3], match[4]].add(int(match[2]))
    for (start, total, end), there in numbers.items():
        if missing := sorted(set(range(int(total))) - there):
            raise DataError(
                f"{asked.by}: {asked.place}: {len(missing)} of {int(total)} files are missing, "
                f"the first is {start}{missing[0]:05d}-of-{total}{end}",
                "download the rest: a part of a split is another split",
            )
