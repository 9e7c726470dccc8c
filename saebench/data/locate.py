"""Where a dataset's files are looked for, and what was found there."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from saebench.data.access import Access
from saebench.errors import DataError
from saebench.specs import DatasetSpec


@dataclass
class Places:
    """The places that were looked at in vain, with what is there instead."""

    lines: list[str] = field(default_factory=list)

    def add(self, form: str, place: object, why: str) -> None:
        """Note a place of a form (`folder`, `tar`, `hub`), and why it will not do."""
        self.lines.append(f"  [{form}] {place}: {why}")

    def __str__(self) -> str:
        return "\n".join(self.lines)


def root_of(form: str, root: str | None, spec: DatasetSpec, access: Access, places: Places):
    """The folder of a form, or None (noted in `places`) where there is none.

    `root` as the entry has it: absolute, or relative to the entry's file; none: the folder of the
    dataset's name below the run's folder of datasets. Errors: DataError where that one was named
    instead of the folder above it.
    """
    if root is None and access.root is None:
        places.add(form, f"<data root>/{spec.name}", "no --data-root, and SAEBENCH_DATA is not set")
        return None
    if root is None:
        path = Path(access.root or "", spec.name)
    else:
        path = Path(spec.path).parent / Path(root).expanduser()
    if not path.is_dir():
        slip = "" if root is not None or access.root is None else _slip(access.root, spec)
        places.add(form, path, "there is no such folder" + slip)
        return None
    return path


def _slip(root: Path, spec: DatasetSpec) -> str:
    """What to say where the folder of datasets seems to be that of the dataset itself.

    Errors: DataError where it is so beyond doubt: no other form, as a download, is to be tried.
    """
    root = root.absolute()
    has = [split for split in (spec.train, spec.test) if (root / split).is_dir()]
    if root.name == spec.name:
        hint = f"did you mean  --data-root {root.parent}?"
        if has:
            raise DataError(
                f"the data root {root} holds {has[0]}/ itself, and dataset '{spec.name}' is looked "
                f"for in {root / spec.name}",
                hint,
            )
        return f"; {hint}"
    if has:
        link = root.parent / spec.name
        return (
            f"; {root} holds {has[0]}/ itself: did you mean  --data-root {root.parent}, after  "
            f"ln -s {root.name} {link}?"
        )
    return ""


def contents(folder: Path, most: int = 8) -> str:
    """What lies in a folder, as `a/, b.txt and 3 more`."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name + "/" * entry.is_dir()
                for entry in entries
                if not entry.name.startswith(".")
            )
    except OSError as error:
        return f"nothing that can be read: {error.strerror}"
    if not names:
        return "nothing"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
