"""Finds the weights file of an entry, identifies its bytes, and turns away what is no weights file.

An entry is a backbone, an SAE, or one of a backbone's published linear heads (`HeadFile`).

The file lies beside the entry, or in a repository of the Hugging Face hub (`saebench.hub`). Nothing
is parsed here: sha256 is checked before anything is. What is most often found in place of weights
(a Git LFS pointer, a web page, nothing) is told apart, since each has another remedy.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from saebench import hub, paths
from saebench.errors import SpecError, WeightsError
from saebench.identity import file_sha256
from saebench.specs import BackboneSpec, SaeSpec, WeightsSpec

LARGEST_HEADER = 100 * 2**20  # bytes, of a safetensors file, by its specification

HUB_MODEL = "hf-hub:"  # its configuration lies in a repository: hf-hub:owner/name@revision

# What each library looks for in a repository, in its own order.
_TIMM = ("model.safetensors", "pytorch_model.bin")
_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class HeadFile:
    """A published linear head of a backbone: what `head.linear` says under a name."""

    backbone: BackboneSpec
    classes: str  # of which dataset, or class list

    @property
    def name(self) -> str:
        return self.backbone.name

    @property
    def path(self) -> str:
        return self.backbone.path

    @property
    def weights(self) -> WeightsSpec:
        return self.backbone.head.linear[self.classes]


Entry = BackboneSpec | SaeSpec | HeadFile


def published_heads(spec: BackboneSpec) -> list[HeadFile]:
    """All published linear heads of a backbone."""
    return [HeadFile(spec, classes) for classes in spec.head.linear]


def table(spec: Entry) -> str:
    """The table of an entry that says where these weights are."""
    return f"head.linear.{spec.classes}" if isinstance(spec, HeadFile) else "weights"


def weights_of(spec: Entry) -> WeightsSpec:
    """Where the weights are. Those of a model `hf-hub:X` are in X, where the entry does not say.

    Errors: SpecError for an entry that says too much.
    """
    weights, where = spec.weights, spec.path or spec.name
    if weights.hub is not None and weights.file is not None:
        both = f"{table(spec)}.file and {table(spec)}.hub"
        raise SpecError(f"{where}: {both} are both there", "keep one of them")
    if isinstance(spec, BackboneSpec) and weights.file is None:
        repo, revision = hub_model(spec)
        if repo and weights.hub in (None, repo):
            return replace(weights, hub=repo, revision=revision or None)
    return weights


def hub_model(spec: BackboneSpec) -> tuple[str, str]:
    """(repository, revision) of a model `hf-hub:owner/name@revision`; two empty strings for others.

    What a loader of the user's own makes of such a name is its own affair.
    Without an @ the revision is that of the weights, if these lie in the same repository: then
    configuration and weights are of one commit.
    """
    if not spec.model.startswith(HUB_MODEL) or spec.loader not in ("timm", "open_clip"):
        return "", ""
    repo, _, revision = spec.model.removeprefix(HUB_MODEL).partition("@")
    declared = spec.weights.revision if spec.weights.hub in (None, repo) else None
    if revision and declared and revision != declared:
        raise SpecError(
            f"{spec.path or spec.name}: model is at {revision}, and weights.revision is {declared}",
            "keep one of them",
        )
    return repo, revision or declared or ""


def wanted(spec: Entry) -> hub.Wanted | None:
    """The file that an entry wants of a hub; None where its weights are not on one.

    Errors: WeightsError for an SAE whose file is not named, SpecError.
    """
    weights = weights_of(spec)
    if weights.hub is None:
        return None
    file = weights.filename
    if isinstance(spec, SaeSpec):
        if not file or file.endswith("/"):
            raise _unnamed(spec, weights)
        names = (file,)
    elif file is not None:
        names = (file,)
    elif isinstance(spec, HeadFile):
        raise SpecError(
            f"{spec.path or spec.name}: {table(spec)}.hub needs a filename",
            f'filename = "…"   the file of {weights.hub} that is the linear head',
        )
    else:
        names = _OPEN_CLIP if spec.loader == "open_clip" else _TIMM
    return hub.Wanted(
        weights.hub, names, spec.name, weights.revision or "", (weights.sha256 or "").lower()
    )


def _unnamed(spec: SaeSpec, weights: WeightsSpec) -> WeightsError:
    """For an SAE on the hub whose file nobody has named: there is no usual name to try."""
    folder = (weights.filename or "").rstrip("/")
    revision = f"@{weights.revision}" if weights.revision else ""
    address = f"{HUB_MODEL}{weights.hub}{revision}/{folder}".rstrip("/")
    where = f"--backbone {spec.backbone} --site {spec.site} --tokens {spec.tokens}"
    return WeightsError(
        f"{spec.path or spec.name}: weights.hub needs a filename: which file of {weights.hub}"
        f"{f', below {folder}/,' if folder else ''} it is, is not known",
        f"saebench new sae {spec.backbone}/NAME --from {address} {where}   writes an entry that "
        "names it; where there are several it says which",
    )


def local_path(spec: Entry, file: str) -> Path:
    """Where a `weights.file` lies: beside its entry, else below the user's folder for weights.

    Where it is in neither, the former.
    """
    beside = Path(os.path.normpath(Path(spec.path).parent / file))
    by_hand = Path(os.path.normpath(paths.user_weights() / file))
    return by_hand if not beside.exists() and by_hand.is_file() else beside


def weights_path(spec: Entry) -> Path | None:
    """The weights file on this machine, downloaded where the entry names a hub; None for none.

    For a `file` see `local_path`. Errors: WeightsError (absent, not named, not to be downloaded,
    not what the entry or the lock says), SpecError (the entry says too much), WriteError (the
    lock file).
    """
    if there := wanted(spec):
        return hub.fetch(there)
    file, where = spec.weights.file, spec.path or spec.name
    if file is None:
        return None
    path = local_path(spec, file)
    if path.is_dir():
        raise WeightsError(f"{where}: {table(spec)}.file = '{file}' is a folder, not a file")
    if not path.is_file():
        hint = f"it was looked for at {path}; a path is relative to the entry's own folder"
        if spec.weights.url:
            hint = f"get it from {spec.weights.url} and put it at {paths.user_weights() / file}"
        raise WeightsError(f"{where}: {table(spec)}.file = '{file}' is not there", hint)
    return path


def weights_sha256(spec: Entry) -> str | None:
    """What identifies an entry's weights: the declared sha256, else the locked, else the file's.

    None where the entry has no weights of its own (a user's loader that brings them). A file of a
    hub is downloaded only where the hub's own metadata do not say.
    Errors: as `weights_path`.
    """
    if spec.weights.sha256 is not None:
        return spec.weights.sha256.lower()
    if there := wanted(spec):
        return hub.resolve(there).sha256
    path = weights_path(spec)
    return None if path is None else file_sha256(path)


def weights_revision(spec: Entry) -> str:
    """The commit of the repository that the weights come from; '' for a file, or not yet known."""
    there = wanted(spec)
    if there is None:
        return ""
    if hub.is_commit(there.revision):
        return there.revision
    found = hub.known(there)
    return found.commit if found else ""


def weights_bytes(spec: Entry) -> int:
    """The size of the weights file; 0 where there is none here. Downloads nothing.

    Errors: as `weights_path`.
    """
    if there := wanted(spec):
        path = hub.cached(there)
        return path.stat().st_size if path else hub.resolve(there).bytes
    file = spec.weights.file
    path = local_path(spec, file) if file else None
    return path.stat().st_size if path and path.is_file() else 0


def verified_path(spec: Entry) -> Path | None:
    """The weights file, its bytes those that the entry declares. None where it names none.

    Errors: those of `weights_path`; WeightsError (altered, or no weights file at all).
    """
    path, declared = weights_path(spec), spec.weights.sha256
    if path is None:
        return None
    first_bytes(path)
    if declared is not None and (found := file_sha256(path)) != declared.lower():
        raise WeightsError(
            f"{path} is not the file that {spec.path or spec.name} describes: "
            f"its sha256 is {found}, declared is {declared} ({path.stat().st_size:,} bytes)",
            "it was altered or only partly downloaded: get it again; "
            f"if the change is meant, write the new sha256 under [{table(spec)}]",
        )
    return path


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with `head` is safetensors: 8 bytes of its header's length, `{`.

    To be asked before any other magic number: a length of 640 bytes begins as a pickle does, while
    no pickle or zip archive has a `{` there after 8 bytes that are a length a header can have.
    """
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LARGEST_HEADER


def first_bytes(path: Path) -> bytes:
    """The first 512 bytes of what may be weights. Errors: WeightsError for what is none."""
    try:
        if not path.is_file() and path.exists():  # opening a pipe would wait for its other end
            raise WeightsError(f"{path} is no file", "name the weights file itself")
        with path.open("rb") as file:
            head = file.read(512)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(f"{path} cannot be read: {reason}", "is its path right?") from None
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
