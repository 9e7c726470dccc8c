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
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
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

    def same(self, other: Locked | None) -> bool:
        """Whether both are the same bytes of the same commit, whenever they came."""
        mine = (self.commit, self.file, self.sha256)
        return other is not None and mine == (other.commit, other.file, other.sha256)


@dataclass
class Update:
    """What came since an update began, all asked anew."""

    found: dict[Asked, Locked] = field(default_factory=dict)

    def outdated(self) -> dict[Asked, Locked]:
        """What is locked at other commits than those that came now, and was not itself asked for.

        All files of a repository at one revision come from one commit, so these move too.
        """
        commits = {(a.kind, a.repo, a.revision): found.commit for a, found in self.found.items()}
        return {
            asked: old
            for asked, old in _read(lock_path()).items()
            if asked not in self.found
            and commits.get((asked.kind, asked.repo, asked.revision), old.commit) != old.commit
        }


_update: ContextVar[Update | None] = ContextVar("update", default=None)


def lock_path() -> Path:
    """Where the lock file is, or will be: `$SAEBENCH_LOCK`, else in the user's folder."""
    if path := os.environ.get("SAEBENCH_LOCK"):
        return Path(path).expanduser()
    return paths.user_config() / "saebench.lock"


def everything() -> dict[Asked, Locked]:
    """All that is locked. Errors: WeightsError for a lock file that cannot be read."""
    return dict(_known())


def find(asked: Asked) -> Locked | None:
    """What came the first time this was asked for; None if it never was.

    Errors: WeightsError for a lock file that cannot be read.
    """
    return _known().get(asked)


def commit_of(asked: Asked) -> str:
    """The commit that this repository and revision were locked at, by any of its files; or ''.

    All files that are asked of one repository at one revision come from one commit.
    """
    for other, found in _known().items():
        if (other.kind, other.repo, other.revision) == (asked.kind, asked.repo, asked.revision):
            return found.commit
    return ""


def keep(asked: Asked, found: Locked) -> Locked:
    """Write down what came, and return what holds: of several processes, the first one's.

    During an update it is written with all the rest, at its end.

    Errors: WeightsError for a lock file that cannot be read, WriteError for one that cannot be
    written.
    """
    if update := _update.get():
        return update.found.setdefault(asked, found)
    with _held() as path:
        known = _read(path)
        if asked not in known:
            _write(path, {**known, asked: found})
            return found
        return known[asked]


@contextmanager
def updating() -> Iterator[Update]:
    """Ask anew: within, nothing is known to be locked; at the end, what came is locked instead.

    That is one write. Whatever ends the update before leaves all as it was.
    Errors: as `keep`, at once, before anything is asked.
    """
    with _held() as path:
        _read(path)
    update = Update()
    token = _update.set(update)
    try:
        yield update
    finally:
        _update.reset(token)
    if not update.found:
        return
    with _held() as path:
        gone = update.outdated()
        kept = {asked: old for asked, old in _read(path).items() if asked not in gone}
        _write(path, kept | update.found)


def is_updating() -> bool:
    """Whether this is within `updating`."""
    return _update.get() is not None


def _known() -> dict[Asked, Locked]:
    update = _update.get()
    return _read(lock_path()) if update is None else update.found


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
