"""What makes two things the same thing: canonical JSON of their fields, or bytes, and the sha256.

Canonical: keys sorted, no white space, ASCII, floats in their shortest exact form. The integer 1
and the float 1.0 are different values and hash differently; a tuple and a list hash alike.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> str:
    """The one text of a plain value (dict, list, str, int, float, bool, None).

    Errors: TypeError for any other type, ValueError for NaN and infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes in hex, remembered while its size and time do not change."""
    stat = path.stat()
    return _hash(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@lru_cache(maxsize=4096)
def _hash(path: Path, *seen: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
