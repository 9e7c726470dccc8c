"""Where a run looks for datasets, and how much of a stream it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Access:
    """What of reading a dataset belongs to the machine and the run, and not to its entry.

    root: the folder of datasets (`--data-root`, else `SAEBENCH_DATA`); None: there is none.
    first: split -> how many rows are taken of a stream, which has no end that one could know.
    """

    root: Path | None = None
    first: Mapping[str, int] = field(default_factory=dict)
