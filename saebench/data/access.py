"""Where a run looks for datasets, and how much of a stream it takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from saebench.errors import UsageError


@dataclass(frozen=True)
class Access:
    """What of reading a dataset belongs to the machine and the run, and not to its entry.

    root: the folder of datasets (`--data-root`, else `SAEBENCH_DATA`); None: there is none.
    download: False takes only what is on this machine already.
    first: split -> how many rows are taken of a stream, which has no end that one could know.
    """

    root: Path | None = None
    first: Mapping[str, int] = field(default_factory=dict)
    download: bool = True

    @classmethod
    def of(cls, data_root: str | None, first: Mapping[str, int | None] | None = None) -> Access:
        """`data_root` as typed, else `SAEBENCH_DATA`. Errors: UsageError (no such folder)."""
        typed = data_root or os.environ.get("SAEBENCH_DATA")
        root = Path(typed).expanduser() if typed else None
        if root is not None and not root.is_dir():
            who = f"--data-root {typed}" if data_root else f"SAEBENCH_DATA = {typed}"
            raise UsageError(
                f"{who}: there is no such folder",
                "name the folder that holds the datasets, each in a folder of its own name",
            )
        known = {split: n for split, n in (first or {}).items() if n is not None}
        return cls(root, known)
