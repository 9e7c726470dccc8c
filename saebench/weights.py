"""Finds the weights file of an entry and identifies its bytes. Nothing is parsed here."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from saebench.errors import SpecError, WeightsError
from saebench.specs import WeightsSpec


def weights_path(weights: WeightsSpec, entry: str) -> Path | None:
    """The local file of an entry, or None where the entry names none.

    `file` is relative to the entry's own folder. Errors: WeightsError when it is not there.
    """
    if weights.file is None:
        return None
    path = Path(entry).parent / weights.file
    if path.is_dir():
        raise WeightsError(f"{entry}: weights.file = '{weights.file}' is a folder, not a file")
    if not path.is_file():
        raise WeightsError(
            f"{entry}: weights.file = '{weights.file}' is not there",
            f"it was looked for at {path}; a path is relative to the entry's own folder",
        )
    return path


def weights_sha256(weights: WeightsSpec, entry: str) -> str | None:
    """What identifies an entry's weights: the declared sha256, else that of its local file.

    None where the entry has no weights of its own (an architecture alone).
    """
    if weights.sha256 is not None:
        return weights.sha256
    path = weights_path(weights, entry)
    if path is not None:
        return file_sha256(path)
    if weights.hub is not None:
        raise SpecError(
            f"{entry}: weights on a hub need a sha256 to be identified",
            "download the file, and write its sha256 under [weights]",
        )
    return None


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes in hex, remembered while its size and time do not change."""
    stat = path.stat()
    return _hash(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified_path(weights: WeightsSpec, entry: str) -> Path:
    """The local file of an entry, its bytes checked against `sha256` where one is declared.

    Errors: WeightsError (absent, altered), SpecError (the entry names no file).
    """
    path = weights_path(weights, entry)
    if path is None:
        raise SpecError(f"{entry}: there is no weights.file", 'write  [weights]  file = "…"')
    if weights.sha256 is not None and (found := file_sha256(path)) != weights.sha256:
        raise WeightsError(
            f"{path} is not the file that {entry} describes: "
            f"sha256 {found[:16]}…, declared {weights.sha256[:16]}…",
            "it was altered or only partly downloaded: restore it, "
            "or correct sha256 in the entry if the change is meant",
        )
    return path
