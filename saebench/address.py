"""Where a checkpoint is: a file, a folder, or a place in a repository of the Hugging Face hub.

    path/to/sae.pt   path/to/folder   hf-hub:owner/name[@revision][/path/in/repo]

In a folder, or a repository, its weights are found by the names that the projects give them. One
that several files could be is refused with their names; nothing is parsed here.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from saebench import hub
from saebench.beside import usual, usual_names
from saebench.errors import UsageError
from saebench.weights import HUB_MODEL

USUAL = (
    "sae_weights.safetensors",  # SAELens
    "sae.safetensors",  # sparsify
    "ae.pt",  # dictionary_learning
    "sae.pt",  # saev, visaebench
    "weights.pt",  # ViT-Prisma
    "n_images_*.pt",
    "model.safetensors",  # mlsae, visaebench
    "model.pt",
    "params.npz",  # Gemma Scope
    "autoencoder_final.pt",  # MonoLoss
    "sparse_autoencoder_final.pt",  # Discover-then-Name
    "*.weights.safetensors",  # saeco
    "checkpoints/final.safetensors",  # Llama Scope
    "checkpoints/ae_*.pt",  # dictionary_learning, while it trains
)
"""What projects call the weights of an SAE, below its folder."""

_WEIGHTS = (".safetensors", ".pt", ".pth", ".npz", ".bin", ".pkl", ".pkl.gz")
_OTHERS = ("sparsity.safetensors", "activation_whitening.safetensors", "*_state.pt", "optimizer*")


@dataclass(frozen=True)
class Checkpoint:
    """A weights file on this machine, and the configurations beside it.

    `beside`: the name that an entry gives each (`../config.json`) -> the file. `repo`, `commit` and
    `file` are where it lies on the hub; empty for a file of one's own.
    """

    path: Path
    beside: Mapping[str, Path] = field(default_factory=dict)
    repo: str = ""
    commit: str = ""
    file: str = ""

    @property
    def configurations(self) -> dict[str, Path]:
        """The same by the names that formats know; the nearer of two that are called alike."""
        found: dict[str, Path] = {}
        for name, path in self.beside.items():
            found.setdefault(posixpath.basename(name), path)
        return found

    @property
    def title(self) -> str:
        """What a person would call it: its file's stem, or its folder's where all are alike."""
        place = self.path.absolute().as_posix() if not self.repo else f"{self.repo}/{self.file}"
        parts = place.split("/")
        usual = any(fnmatchcase(parts[-1], posixpath.basename(name)) for name in USUAL)
        if not usual:
            stem = parts[-1]
            for suffix in sorted(_WEIGHTS, key=len, reverse=True):
                stem = stem.removesuffix(suffix)
            return stem
        return parts[-3] if parts[-2] == "checkpoints" and len(parts) > 2 else parts[-2]


def locate(address: str | Path, by: str = "") -> Checkpoint:
    """The checkpoint at an address, fetched where it is the hub's.

    by: who asks, for messages. Errors: UsageError (no such place, no weights there, or several that
    could be meant); those of `hub.fetch`.
    """
    if isinstance(address, str) and address.startswith(HUB_MODEL):
        return _on_hub(address, by or address)
    path = Path(address).expanduser()
    if path.is_dir():
        names = [str(file.relative_to(path).as_posix()) for file in _files(path)]
        path = path / _chosen(names, str(path))
    elif not path.is_file():
        raise UsageError(f"{address}: there is no such file or folder")
    folder = path.absolute().parent
    found = {_from(file, folder): file for file in usual(path).values()}
    return Checkpoint(path, found)


def _files(folder: Path) -> Iterable[Path]:
    return [p for p in sorted([*folder.glob("*"), *folder.glob("checkpoints/*")]) if p.is_file()]


def _from(file: Path, folder: Path) -> str:
    return file.name if file.parent == folder else f"../{file.name}"


def weights_in(names: Iterable[str]) -> list[str]:
    """Of the files of a folder, those that may be its weights: one for most.

    The usual names; those in the folder itself before those below it; and where there is none, a
    weights file of any name.
    """
    names = sorted(names)
    found = [name for name in names if any(_is(name, pattern) for pattern in USUAL)]
    if here := [name for name in found if "/" not in name]:
        return here
    if found:
        return found
    others = [name for name in names if "/" not in name and name.endswith(_WEIGHTS)]
    return [name for name in others if not any(fnmatchcase(name, other) for other in _OTHERS)]


def _is(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _chosen(names: Iterable[str], where: str) -> str:
    """Errors: UsageError for none, or several."""
    names = list(names)
    found = weights_in(names)
    if len(found) == 1:
        return found[0]
    if found:
        shown = "".join(f"\n    {name}" for name in found[:20])
        more = f"\n    and {len(found) - 20} more" if len(found) > 20 else ""
        raise UsageError(
            f"{where} holds several files that could be meant:{shown}{more}", "name the file"
        )
    shown = ", ".join(sorted(names)[:8]) or "nothing"
    raise UsageError(
        f"{where} holds no weights file of a usual name; there: {shown}",
        "name the file, or the folder in which it lies",
    )


# --- the hub ------------------------------------------------------------------------------------


def parse_hub(address: str) -> tuple[str, str, str]:
    """(owner/name, revision, path) of `hf-hub:owner/name[@revision][/path]`. Errors: UsageError."""
    parts = address.removeprefix(HUB_MODEL).strip("/").split("/")
    name, _, revision = parts[1].partition("@") if len(parts) > 1 else ("", "", "")
    path = posixpath.normpath("/".join(parts[2:])) if parts[2:] else ""
    if not parts[0] or not name or path.startswith(".."):
        raise UsageError(
            f"{address} is no place on the hub", "hf-hub:OWNER/NAME[@REVISION][/PATH/IN/REPO]"
        )
    return f"{parts[0]}/{name}", revision, path


def hub_files(address: str, by: str = "") -> tuple[hub.Wanted, dict[str, hub.Wanted]]:
    """The weights at an address of the hub, and the configurations beside them by their names.

    The hub is asked which files there are; where nobody answers, the cache. Errors: UsageError;
    those of `hub.files_of`.
    """
    repo, revision, path = parse_hub(address)

    def wanted(*names: str) -> hub.Wanted:
        return hub.Wanted(repo, names, by or address, revision)

    there = hub.files_of(wanted())
    file = path if path in there else _found(there, repo, path)
    folder = posixpath.dirname(file)
    beside: dict[str, hub.Wanted] = {}
    for name in usual_names(file):
        place = posixpath.normpath(posixpath.join(folder, name))
        if place in there and posixpath.basename(name) not in map(posixpath.basename, beside):
            beside[name] = wanted(place)
    return wanted(file), beside


def _found(there: Iterable[str], repo: str, path: str) -> str:
    """The weights file in a folder of a repository. Errors: UsageError."""
    below = f"{path}/" if path else ""
    names = [name.removeprefix(below) for name in there if name.startswith(below)]
    if not names:
        near = [name for name in there if name.endswith(_WEIGHTS)]
        raise UsageError(
            f"{repo} has no file or folder '{path}'", f"it has: {', '.join(near[:12])}"
        )
    return below + _chosen(names, f"{HUB_MODEL}{repo}/{path}".rstrip("/"))


def _on_hub(address: str, by: str) -> Checkpoint:
    file, beside = hub_files(address, by)
    path = hub.fetch(file)
    found = hub.resolve(file)
    files = {name: hub.fetch(one) for name, one in beside.items()}
    return Checkpoint(path, files, file.repo, found.commit, found.file)
