"""`saebench new`: writes a commented entry or task file that passes `saebench check`.

An SAE and a backbone are looked at before their entries are written (`sae`, `backbone`); a dataset
and a task are texts to change (`texts`).
"""

from __future__ import annotations

import keyword
import os
import re
from pathlib import Path
from typing import Any

from saebench.atomic import check_folder, make_folder
from saebench.errors import UsageError
from saebench.registry import Registry, Shelf

FOLDERS = {
    "sae": "registry/saes",
    "backbone": "registry/backbones",
    "dataset": "registry/datasets",
    "task": "tasks",
}


def write_new(
    registry: Registry,
    kind: str,
    name: str,
    *,
    out: str,
    weights: str | None = None,
    source: str | None = None,
    loader: str | None = None,
) -> Path:
    """Write the file of a backbone, dataset or task and return its path. Nothing is overwritten.

    source: of a backbone, `timm:…`, `open_clip:…` or `hf-hub:…` (`saebench.scaffold.upstream`).
    Of an SAE: `saebench.scaffold.sae.new_sae`.
    Errors: UsageError for a name that is none or is taken; WriteError for a place that cannot be
    written; those of building a backbone's model.
    """
    path = checked_path(registry, kind, name, out)
    if kind != "backbone" and (source or loader or weights):
        raise UsageError(f"--from, --weights and --loader are not of a {kind}")
    make_folder(path.parent)
    try:
        if kind == "backbone":
            from saebench.scaffold.backbone import backbone_entry

            text = backbone_entry(registry, name, path, weights, source, loader)
        else:
            text = _plain_text(kind, name)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}", "choose another --out") from None
    return path


def checked_path(registry: Registry, kind: str, name: str, out: str) -> Path:
    """Where a new entry of this name will be.

    Errors: UsageError for a name that cannot be new, WriteError for a place that cannot be written.
    """
    check_name(kind, name)
    path = entry_path(kind, name, out)
    check_folder(path.parent)
    if path.exists():
        raise UsageError(f"{path} is there already", "choose another name, or edit that file")
    if (taken := _taken(registry, kind, name)) is not None:
        raise UsageError(f"the name '{name}' is that of {taken}", "choose another name")
    return path


def _taken(registry: Registry, kind: str, name: str) -> Path | None:
    """The file of the entry or task that has this name: two of one name are an error."""
    if kind == "task":
        return registry.task_path(name)[1] if name in registry.task_files else None
    shelf: Shelf[Any] = {
        "sae": registry.saes,
        "backbone": registry.backbones,
        "dataset": registry.datasets,
    }[kind]
    return shelf.path(name) if name in shelf else None


def _plain_text(kind: str, name: str) -> str:
    from saebench.scaffold.texts import DATASET, TASK

    if kind == "dataset":
        return DATASET.replace("NAME", name)
    title = "".join(part.title() for part in name.split("_"))
    return TASK.replace("NAME", name).replace("CLASS", title)


def entry_path(kind: str, name: str, out: str) -> Path:
    """Where an entry of this name lies below a content folder."""
    return Path(out) / FOLDERS[kind] / f"{name}{'.py' if kind == 'task' else '.toml'}"


def check_name(kind: str, name: str) -> None:
    """Errors: UsageError for a name that cannot be a file's, a glob's or a Python class's."""
    if kind == "task":
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise UsageError(f"'{name}' cannot be a task's name", "use letters, digits and _")
    elif not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)*", name):
        raise UsageError(
            f"'{name}' cannot be an entry's name", "use letters, digits and . _ + - (and / )"
        )


def weights_file(weights: str) -> Path:
    """A file named by --weights. Errors: UsageError where there is none."""
    file = Path(weights)
    if not file.is_file():
        raise UsageError(f"--weights {weights}: there is no such file")
    return file


def relative(file: Path, folder: Path) -> str:
    """A file as an entry in this folder names it."""
    return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
