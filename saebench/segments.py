"""What a run has measured so far: one small file for each (unit, segment of the images).

    <root>/<unit id>/<segment>.state  =  sha256 of the rest (32 bytes), then a safetensors file

States are numpy arrays, kept to the bit. They are renamed into place but not flushed: a kill loses
nothing that was saved, a power cut may, and either way a file that does not match its sha256 is
dropped with a warning, so that its segment is simply computed anew.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np

from saebench.atomic import unwritable, write_bytes
from saebench.tensors import from_bytes, to_bytes

_SUFFIX = ".state"
_DIGEST = 32  # bytes of a sha256


class SegmentStore:
    """Partial states below one folder, which is made when the first of them is saved."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def save(self, unit_id: str, segment: int, state: Mapping[str, np.ndarray]) -> None:
        """Keep one state. Errors: WriteError; TypeError for arrays of strings or objects."""
        data = to_bytes(state)
        path = self._path(unit_id, segment)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path.parent, error) from error
        write_bytes(path, sha256(data).digest() + data, sync=False)

    def save_many(self, segment: int, states: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Keep the states of many units, by unit id, of one segment."""
        for unit_id, state in states.items():
            self.save(unit_id, segment, state)

    def load(self, unit_id: str, segment: int) -> dict[str, np.ndarray] | None:
        """The state as it was saved; None where there is none, or, with a warning, half of one."""
        path = self._path(unit_id, segment)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        if sha256(raw[_DIGEST:]).digest() != raw[:_DIGEST]:
            path.unlink(missing_ok=True)
            warnings.warn(f"{path} was damaged: segment {segment} is computed anew", stacklevel=2)
            return None
        return from_bytes(raw[_DIGEST:])

    def segments(self, unit_id: str) -> set[int]:
        """The segments of which a state is there."""
        paths = (self.root / unit_id).glob(f"*{_SUFFIX}")
        return {int(path.stem) for path in paths if path.stem.isdecimal()}

    def discard(self, unit_id: str) -> None:
        """Forget all states of a unit."""
        shutil.rmtree(self.root / unit_id, ignore_errors=True)

    def _path(self, unit_id: str, segment: int) -> Path:
        return self.root / unit_id / f"{segment:06d}{_SUFFIX}"
