"""What makes two things the same thing: canonical JSON of their fields, and its sha256.

Canonical: keys sorted, no white space, ASCII, floats in their shortest exact form. The integer 1
and the float 1.0 are different values and hash differently; a tuple and a list hash alike.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> str:
    """The one text of a plain value (dict, list, str, int, float, bool, None).

    Errors: TypeError for any other type, ValueError for NaN and infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()
