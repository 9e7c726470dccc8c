"""Files of the Hugging Face hub: resolved to a commit, downloaded, checked by sha256, and locked.

Everything goes through huggingface_hub and its cache, so its settings hold: HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE. Which bytes a file has is known from, in this order: the entry, the
lock file, the hub's own sha256 (it has one for large files), and else the first download. What is
known is checked each time a file is handed out; nothing that differs is ever handed out.

What is locked and cached needs no network.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from saebench import lock
from saebench.errors import SaebenchError, WeightsError, WriteError
from saebench.hub_errors import failures, problem, unreachable
from saebench.identity import file_sha256
from saebench.lock import Asked, Kind, Locked

downloading: ContextVar[Callable[[], AbstractContextManager[None]]] = ContextVar(
    "downloading", default=nullcontext
)
"""Entered while something is downloaded: huggingface_hub's bar then has the terminal alone."""


@dataclass(frozen=True)
class Wanted:
    """One file that an entry wants: the first of `names` that the repository has."""

    repo: str  # owner/name
    names: tuple[str, ...]
    by: str  # the entry's name, for messages and  saebench fetch NAME
    revision: str = ""  # a commit, tag or branch; '': the default branch
    sha256: str = ""  # as the entry declares it
    kind: Kind = "model"

    @property
    def pinned(self) -> bool:
        """Whether the entry leaves nothing open: then there is nothing to lock."""
        return is_commit(self.revision) and len(self.names) == 1 and self.sha256 != ""

    @property
    def asked(self) -> Asked:
        """The key of the lock file."""
        return Asked(self.kind, self.repo, self.revision, " or ".join(self.names))


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit hash, which never moves."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def known(wanted: Wanted) -> Locked | None:
    """What a file is, if the entry or the lock file says so; None where the hub must be asked.

    Errors: WeightsError where the two differ.
    """
    if wanted.pinned:
        return Locked(wanted.revision, wanted.names[0], wanted.sha256)
    found = lock.find(wanted.asked)
    if found is not None:
        _agree(wanted, found, f"locked in {lock.lock_path()}")
    return found


def cached(wanted: Wanted) -> Path | None:
    """The file if it is known and on this machine. Asks nobody; its bytes are not checked."""
    found = known(wanted)
    return _in_cache(wanted, found.file, found.commit) if found else None


def resolve(wanted: Wanted) -> Locked:
    """What a file is: commit, name, sha256. Locked from here on.

    Asks the hub for the file's metadata, and downloads it only where that has no sha256.
    Errors: WeightsError with what to type next; WriteError for a lock file that cannot be written,
    unless the commit is known already: it decides what the file is.
    """
    if found := known(wanted):
        return found
    commit = wanted.revision if is_commit(wanted.revision) else lock.commit_of(wanted.asked)
    # Which of several names an entry means is the hub's to say, unless the entry pins the commit.
    sure = commit and (commit == wanted.revision or len(wanted.names) == 1)
    found = (_here(wanted, commit) if sure else None) or _ask(wanted)
    if not found.sha256:
        path = _download(wanted, found)
        found = replace(found, sha256=file_sha256(path), bytes=path.stat().st_size)
    _agree(wanted, found, "the hub has")
    found = replace(found, when=_now())
    try:
        return lock.keep(wanted.asked, found)
    except WriteError:
        if not commit:
            raise
        return found


def fetch(wanted: Wanted) -> Path:
    """The file on this machine, downloaded where it is not there, its sha256 checked.

    Errors: those of `resolve`; WeightsError for bytes that are not the known ones.
    """
    found = resolve(wanted)
    path = _download(wanted, found)
    if (sha256 := file_sha256(path)) != found.sha256:
        source = "declared in the entry" if wanted.sha256 else f"known ({lock.lock_path()})"
        raise WeightsError(
            f"{wanted.by}: {path} is not {found.file} of {wanted.repo} at {found.commit}: its "
            f"sha256 is {sha256} ({path.stat().st_size:,} bytes), {source} is {found.sha256}",
            f"it was altered or damaged: remove it  (rm '{path.resolve()}')  and get it again with "
            f"saebench fetch {wanted.by}",
        )
    return path


def files_of(wanted: Wanted) -> list[str]:
    """The names of all files of the repository, at the commit that it is locked at.

    Where nobody answers, those that the cache has. Errors: as `resolve`.
    """
    from huggingface_hub import HfApi

    revision = lock.commit_of(wanted.asked) or wanted.revision
    # Not list_repo_files, which tries for half a minute where nobody listens.
    ask = HfApi().model_info if wanted.kind == "model" else HfApi().dataset_info
    try:
        info = ask(wanted.repo, revision=revision or None)
    except failures() as error:
        seen = replace(wanted.asked, revision=revision)
        folder = _snapshot(seen) if _cache_will_do(error, revision) else None
        if folder is None:
            raise _problem(replace(wanted, names=()), error, revision) from error
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [file.rfilename for file in info.siblings or ()]


def resolve_revision(repo: str, revision: str | None, *, kind: Kind, by: str) -> str:
    """The commit of a repository's revision (None: the default branch), locked from here on.

    Errors: WeightsError for a model, DataError for a dataset, with what to type next.
    """
    if revision and is_commit(revision):
        return revision
    asked = Asked(kind, repo, revision or "")
    if commit := lock.commit_of(asked):
        return commit
    from huggingface_hub import HfApi

    try:
        commit = str(HfApi().repo_info(repo, revision=revision, repo_type=kind).sha)
    except failures() as error:
        folder = _snapshot(asked) if _cache_will_do(error, asked.revision) else None
        if folder is None:
            wanted = Wanted(repo, (), by, asked.revision, kind=kind)
            raise _problem(wanted, error, asked.revision) from error
        commit = folder.name
    return lock.keep(asked, Locked(commit, when=_now())).commit


def _cache_will_do(error: BaseException, revision: str) -> bool:
    """Whether what the cache last saw answers for a hub that does not: not for what has moved."""
    return unreachable(error) and (is_commit(revision) or not lock.is_updating())


def _snapshot(asked: Asked) -> Path | None:
    """The folder in which the cache has what it last saw at a revision; None where it never did."""
    from huggingface_hub import snapshot_download

    try:
        there = snapshot_download(
            asked.repo,
            revision=asked.revision or None,
            repo_type=asked.kind,
            local_files_only=True,
        )
    except failures():
        return None
    return Path(there)


def _ask(wanted: Wanted) -> Locked:
    """The first of the names that the hub has; where nobody answers, that the cache has."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    revision = lock.commit_of(wanted.asked) or wanted.revision
    missing: EntryNotFoundError | None = None
    for name in wanted.names:
        try:
            url = hf_hub_url(wanted.repo, name, repo_type=wanted.kind, revision=revision or None)
            there = get_hf_file_metadata(url)
        except EntryNotFoundError as error:
            missing = error
            continue
        except failures() as error:
            if _cache_will_do(error, revision) and (found := _here(wanted, revision)):
                return found
            raise _problem(wanted, error, revision) from error
        if there.commit_hash is None or there.etag is None:
            raise _problem(wanted, _no_hub(), revision)
        etag = there.etag if re.fullmatch(r"[0-9a-f]{64}", there.etag) else ""
        return Locked(there.commit_hash, name, etag, there.size or 0)
    assert missing is not None
    raise _problem(wanted, missing, revision) from missing


def _here(wanted: Wanted, revision: str) -> Locked | None:
    """The first of the names that the cache has at a revision, as it was last seen there."""
    for name in wanted.names:
        if path := _in_cache(wanted, name, revision):
            # The cache calls the bytes of a large file by their sha256.
            blob = path.resolve().name
            sha256 = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else file_sha256(path)
            commit = path.parents[len(Path(name).parts) - 1].name
            return Locked(commit, name, sha256, path.stat().st_size)
    return None


def _in_cache(wanted: Wanted, name: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        wanted.repo, name, revision=revision or None, repo_type=wanted.kind
    )
    return Path(found) if isinstance(found, str) else None


def _download(wanted: Wanted, found: Locked) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if path := _in_cache(wanted, found.file, found.commit):
        return path
    url = hf_hub_url(wanted.repo, found.file, repo_type=wanted.kind, revision=found.commit)
    try:
        # Where nobody listens, hf_hub_download tries for half a minute: that is seen before. What a
        # hub that does listen answers is left to it: it is patient with one that is busy.
        with suppress(HfHubHTTPError):
            get_hf_file_metadata(url)
        with downloading.get()():
            path = hf_hub_download(
                wanted.repo, found.file, revision=found.commit, repo_type=wanted.kind
            )
    except failures() as error:
        raise _problem(replace(wanted, names=(found.file,)), error, found.commit) from error
    return Path(path)


def _agree(wanted: Wanted, found: Locked, where: str) -> None:
    """Errors: WeightsError where the entry says another commit or sha256."""
    if is_commit(wanted.revision) and found.commit != wanted.revision:
        raise WeightsError(
            f"{wanted.by}: {wanted.repo} at {wanted.revision}: {where} commit {found.commit}",
            f"a commit is itself and no other: check HF_ENDPOINT; saebench fetch {wanted.by} "
            "--update asks anew",
        )
    if wanted.sha256 and found.sha256 != wanted.sha256:
        raise WeightsError(
            f"{wanted.by}: {found.file} of {wanted.repo} at {found.commit}: {where} sha256 "
            f"{found.sha256}, and the entry declares {wanted.sha256}",
            "correct  sha256  or  revision  under [weights]; "
            f"saebench fetch {wanted.by} --update  asks the hub anew",
        )


def _problem(wanted: Wanted, error: BaseException, revision: str) -> SaebenchError:
    return problem(
        error,
        kind=wanted.kind,
        repo=wanted.repo,
        revision=revision,
        files=wanted.names,
        by=wanted.by,
        locked=revision != wanted.revision,
        there=_weights_there(wanted, error),
    )


def _weights_there(wanted: Wanted, error: BaseException) -> list[str]:
    """Where a file is not in a repository: those that could be meant, if the hub tells."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
        return []
    try:
        found = files_of(wanted)
    except SaebenchError:
        return []
    return [name for name in found if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]


def _no_hub() -> Exception:
    from huggingface_hub.errors import FileMetadataError

    return FileMetadataError("it sends no commit")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
