"""What a failed request to the hub means, and what to type next."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

from saebench.errors import DataError, SaebenchError, WeightsError
from saebench.lock import Kind, lock_path

# By name, since the HTTP library that they belong to has changed, and may again.
_SILENT = ("ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "ProxyError")
_SPACE = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when it cannot do what it is asked, the connection's own too.

    Those of the connection belong to its HTTP library, and which one that is has changed; the
    hub's own errors are children of them. hf_xet, which fetches large files, raises RuntimeError.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)


def unreachable(error: BaseException) -> bool:
    """Whether nobody answered: no connection, no network, or the hub switched off on purpose."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return True
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, ConnectionError) or type(error).__name__ in _SILENT


def problem(
    error: BaseException,
    *,
    kind: Kind,
    repo: str,
    revision: str,
    files: Sequence[str],
    by: str,
    locked: bool,
    there: Sequence[str] = (),
) -> SaebenchError:
    """The error to raise for what huggingface_hub raised: what is wrong, and what to type next.

    `files`: the names that were looked for; none where it is about a whole dataset. `by`: the
    entry's name. `locked`: the revision is the lock's. `there`: files that the repository has.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # it says that there is no copy here; its cause, why none came
    asked = _Asked(kind, repo, revision, by, locked, tuple(there))
    what, hint = _absent(error, asked) or _forbidden(error, asked) or _failed(error, asked)
    where = f"{' or '.join(files) + ' of ' if files else ''}{repo}"
    where += f" at {revision}" if revision else ""
    raised = WeightsError if kind == "model" else DataError
    return raised(f"{by}: {where}: {what}", hint)


@dataclass(frozen=True)
class _Asked:
    """What was asked, and the parts of messages that follow from it."""

    kind: Kind
    repo: str
    revision: str
    by: str
    locked: bool
    there: tuple[str, ...]

    @property
    def page(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"

    @property
    def ahead(self) -> str:
        return f"on a machine with internet:  saebench fetch {self.by}"

    @property
    def anew(self) -> str:
        newest = "asks for its newest commit"
        return f"saebench fetch {self.by} --update  {newest} (locked in {lock_path()})"


def _absent(error: BaseException, asked: _Asked) -> tuple[str, str] | None:
    """What is not there: neither here nor, where it was asked, on the hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return (
            "it is not on this machine, and HF_HUB_OFFLINE is set",
            f"{asked.ahead}  (with the same HF_HOME); or unset HF_HUB_OFFLINE",
        )
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return (
            f"there is no such {asked.kind} on {constants.ENDPOINT}, or it is private",
            f"check the name at {asked.page}; for a private one  hf auth login  (or set HF_TOKEN)",
        )
    if isinstance(error, RevisionNotFoundError):
        if asked.locked:
            return "there is no such revision any more", asked.anew
        return (
            "there is no such revision",
            f"write a commit, tag or branch that {asked.page}/commits/main has",
        )
    if isinstance(error, EntryNotFoundError):
        tree = f"see {asked.page}/tree/{asked.revision or 'main'}"
        has = f"it has {', '.join(asked.there)}" if asked.there else tree
        hint = f"{has}: say which by  filename"
        return "there is no such file", f"{hint}; or {asked.anew}" if asked.locked else hint
    if isinstance(error, HFValidationError):
        return f"that is no name of a repository: {error}", "write it as  owner/name"
    return None


def _forbidden(error: BaseException, asked: _Asked) -> tuple[str, str] | None:
    """What the hub does not give to whoever asks, or does not give now."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return None
    status = error.response.status_code
    if isinstance(error, GatedRepoError) and status == 401:
        return (
            "it is gated, and the hub does not know who you are",
            f"accept its licence at {asked.page}, then  hf auth login  (or set HF_TOKEN)",
        )
    if isinstance(error, GatedRepoError):
        return (
            "it is gated, and your account has no access",
            f"accept its licence at {asked.page}, and wait until it is granted where its owner "
            "decides",
        )
    hints = {
        401: "your token is not accepted:  hf auth login  again, or correct HF_TOKEN",
        403: f"your token may not read it: see {asked.page}, or take another token",
        429: "too many requests: wait a few minutes; with  hf auth login  more are allowed",
    }
    return (
        f"the hub at {constants.ENDPOINT} answers {status}",
        hints.get(status, "it is the hub's own trouble: try again later"),
    )


def _failed(error: BaseException, asked: _Asked) -> tuple[str, str]:
    """What goes wrong on the way, or on the disk."""
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError

    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, FileMetadataError):
        return (
            f"what answers at {constants.ENDPOINT} is not a hub: {error}",
            "check HF_ENDPOINT, the proxy and the firewall",
        )
    if number in _SPACE or "No space left" in str(error):
        return (
            f"there is no space left for it in {constants.HF_HUB_CACHE}",
            "free some space, or let HF_HOME name a folder on another disk",
        )
    if number in _DENIED:
        return (
            f"{constants.HF_HUB_CACHE} cannot be written: {error}",
            "let HF_HOME name a folder that you may write to",
        )
    if "Timeout" in type(error).__name__:
        return (
            f"{constants.ENDPOINT} did not answer in time",
            "try again; with HF_HUB_ETAG_TIMEOUT=60 and HF_HUB_DOWNLOAD_TIMEOUT=60 more is waited; "
            f"or {asked.ahead}",
        )
    if unreachable(error):
        return (
            f"{constants.ENDPOINT} cannot be reached: {error}",
            f"check the connection, the proxy and HF_ENDPOINT; or {asked.ahead}",
        )
    return (
        f"it cannot be downloaded: {error}",
        "try again; HF_HUB_DISABLE_XET=1 fetches large files from the hub itself, where a firewall "
        "stands before the other hosts",
    )
