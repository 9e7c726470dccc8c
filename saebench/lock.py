"""The lock file: what came from a hub the first time, so that the same comes every time after.

An entry may leave a revision or a file name open, or name a branch, which moves. What was asked
for and what came of it (commit, file, sha256, bytes) is written down at first use in
`saebench.lock`: JSON that a person can read, keep beside a paper, and copy to another machine.
It lies at `$SAEBENCH_LOCK`, else in the user's folder (`saebench.paths.user_config`).

Two processes may write at once: each reads and writes under a file lock, and of two that ask for
the same the first decides for both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from saebench import paths
from saebench.atomic import unwritable, write_bytes
from saebench.errors import WeightsError, WriteError

Kind = Literal["model", "dataset"]
_VERSION = 1


@dataclass(frozen=True, order=True)
class Asked:
    """What was asked of a hub. An empty field was left open."""

    kind: Kind
    repo: str  # owner/name
    revision: str = ""  # '': the default branch
    file: str = ""  # '': the usual names of the one who reads it; or no file, but a whole dataset


@dataclass(frozen=True)
class Locked:
    """What came of it. `file`, `sha256` and `bytes` are empty for a whole dataset."""

    commit: str  # 40 hex digits
    file: str = ""
    sha256: str = ""
    bytes: int = 0
    when: str = ""  # UTC, ISO 8601

    def same(self, other: Locked) -> bool:
        """Whether both are the same bytes of the same commit, whenever they came."""
        return (self.commit, self.file, self.sha256) == (other.commit, other.file, other.sha256)


def lock_path() -> Path:
    """Where the lock file is, or will be: `$SAEBENCH_LOCK`, else in the user's folder."""
    if path := os.environ.get("SAEBENCH_LOCK"):
        return Path(path).expanduser()
    return paths.user_config() / "saebench.lock"


def everything() -> dict[Asked, Locked]:
    """All that is locked. Errors: WeightsError for a lock file that cannot be read."""
    return dict(_read(lock_path()))


def find(asked: Asked) -> Locked | None:
    """What came the first time this was asked for; None if it never was.

    Errors: WeightsError for a lock file that cannot be read.
    """
    return _read(lock_path()).get(asked)


def commit_of(asked: Asked) -> str:
    """The commit that this repository and revision were locked at, by any of its files; or ''.

    All files that are asked of one repository at one revision come from one commit.
    """
    for other, found in _read(lock_path()).items():
        if (other.kind, other.repo, other.revision) == (asked.kind, asked.repo, asked.revision):
            return found.commit
    return ""


def keep(asked: Asked, found: Locked) -> Locked:
    """Write down what came, and return what holds: of several processes, the first one's.

    Errors: WeightsError for a lock file that cannot be read, WriteError for one that cannot be
    written.
    """
    with _held() as path:
        known = _read(path)
        if asked not in known:
            _write(path, {**known, asked: found})
            return found
        return known[asked]


def forget(repositories: Collection[tuple[Kind, str]]) -> dict[Asked, Locked]:
    """Take out all that is locked of some repositories, so that they are asked anew; return it."""
    with _held() as path:
        known = _read(path)
        out = {k: v for k, v in known.items() if (k.kind, k.repo) in repositories}
        if out:
            _write(path, {k: v for k, v in known.items() if k not in out})
        return out


@contextmanager
def _held() -> Iterator[Path]:
    from filelock import FileLock

    path = lock_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path.with_name(f".{path.name}.writing"))
        held.acquire()
    except OSError as error:
        failed = unwritable(path, error)
        raise WriteError(failed.what, f"{failed.hint}; SAEBENCH_LOCK=FILE names another") from None
    try:
        yield path
    finally:
        held.release()


def _read(path: Path) -> dict[Asked, Locked]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise WeightsError(f"the lock file {path} cannot be read: {error.strerror}") from None
    return _parse(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=16)
def _parse(path: Path, *seen: int) -> dict[Asked, Locked]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise ValueError(f"its version is {content['version']}, and {_VERSION} is read here")
        return dict(_entry(line) for line in content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"the lock file {path} cannot be read: {type(error).__name__}: {error}",
            "restore it from where you keep it; or remove it, and what is missing in your entries "
            "is resolved anew, perhaps to other weights than before",
        ) from None


def _entry(line: dict[str, Any]) -> tuple[Asked, Locked]:
    asked, found = Asked(**line["asked"]), Locked(**line["found"])
    if asked.kind not in ("model", "dataset") or not found.commit:
        raise ValueError(f"{line} says too little")
    return asked, found


def _write(path: Path, known: dict[Asked, Locked]) -> None:
    lines = [{"asked": asdict(asked), "found": asdict(known[asked])} for asked in sorted(known)]
    text = json.dumps({"version": _VERSION, "files": lines}, indent=2, ensure_ascii=False)
    write_bytes(path, f"{text}\n".encode())
