"""Where a dataset's files are looked for, and what was found there."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from saebench.data.access import Access
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
    dataset's name below the run's folder of datasets.
    """
    if root is None and access.root is None:
        places.add(form, f"<data root>/{spec.name}", "no --data-root, and SAEBENCH_DATA is not set")
        return None
    if root is None:
        path = Path(access.root or "", spec.name)
    else:
        path = Path(spec.path).parent / Path(root).expanduser()
    if not path.is_dir():
        places.add(form, path, "there is no such folder")
        return None
    return path


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
