"""Finds the weights file of an entry, identifies its bytes, and turns away what is no weights file.

Nothing is parsed here: sha256 is checked before anything is. What is most often found in place of
weights (a Git LFS pointer, a web page, nothing) is told apart, since each has another remedy.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from saebench.errors import SpecError, WeightsError
from saebench.specs import BackboneSpec, SaeSpec, WeightsSpec


def weights_path(spec: BackboneSpec | SaeSpec) -> Path | None:
    """The weights file on this machine, downloaded where the entry names a hub; None for none.

    `file` is relative to the entry's own folder. Errors: WeightsError (absent, not to be
    downloaded), SpecError (the entry does not say enough, or too much).
    """
    weights, entry = spec.weights, spec.path or spec.name
    if weights.hub is not None:
        return _from_hub(weights, entry)
    if weights.file is None:
        return None
    path = Path(os.path.normpath(Path(entry).parent / weights.file))
    if path.is_dir():
        raise WeightsError(f"{entry}: weights.file = '{weights.file}' is a folder, not a file")
    if not path.is_file():
        raise WeightsError(
            f"{entry}: weights.file = '{weights.file}' is not there",
            f"it was looked for at {path}; a path is relative to the entry's own folder",
        )
    return path


def _from_hub(weights: WeightsSpec, entry: str) -> Path:
    if weights.file is not None:
        raise SpecError(f"{entry}: weights.file and weights.hub are both there", "keep one of them")
    if weights.hub is None or weights.revision is None or weights.filename is None:
        raise SpecError(
            f"{entry}: weights.hub needs a revision and a filename",
            "revision is a commit hash, so that the weights stay the same for ever",
        )
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(weights.hub, weights.filename, revision=weights.revision)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{entry}: {weights.filename} of {weights.hub} at {weights.revision} "
            f"cannot be downloaded: {error}",
            "check the names and the connection; a gated model needs `hf auth login`",
        ) from error
    return Path(found)


def weights_sha256(spec: BackboneSpec | SaeSpec) -> str | None:
    """What identifies an entry's weights: the declared sha256, else that of its local file.

    None where the entry has no weights of its own (a user's loader that brings them).
    """
    if spec.weights.sha256 is not None:
        return spec.weights.sha256
    if spec.weights.hub is not None:
        raise SpecError(
            f"{spec.path or spec.name}: weights on a hub need a sha256 to be identified",
            "download the file, and write its sha256 under [weights]",
        )
    path = weights_path(spec)
    return None if path is None else file_sha256(path)


def verified_path(spec: BackboneSpec | SaeSpec) -> Path | None:
    """The weights file, its bytes those that the entry declares. None where it names none.

    Errors: those of `weights_path`; WeightsError (altered, or no weights file at all).
    """
    path, weights = weights_path(spec), spec.weights
    if path is None:
        return None
    first_bytes(path)
    if weights.sha256 is not None and (found := file_sha256(path)) != weights.sha256:
        raise WeightsError(
            f"{path} is not the file that {spec.path or spec.name} describes: "
            f"its sha256 is {found}, "
            f"declared is {weights.sha256} ({path.stat().st_size:,} bytes)",
            "it was altered or only partly downloaded: get it again; "
            "if the change is meant, write the new sha256 under [weights]",
        )
    return path


def first_bytes(path: Path) -> bytes:
    """The first 512 bytes of what may be weights. Errors: WeightsError for what is none."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise WeightsError(f"{path} is empty", "get it again")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not the weights", "run `git lfs pull` in that repository"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(
            f"{path} is a web page, not weights",
            "the download gave a login or error page: take the link to the raw file",
        )
    return head


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes in hex, remembered while its size and time do not change."""
    stat = path.stat()
    return _hash(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@lru_cache(maxsize=4096)
def _hash(path: Path, *seen: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_revision(spec: BackboneSpec | SaeSpec) -> str:
    """The commit of the repository that the weights come from; '' for a local file."""
    return spec.weights.revision or ""
