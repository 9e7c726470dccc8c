"""docs/formats.md lists the formats that are read, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from saebench.formats import FORMATS

PAGE = Path(__file__).parent.parent / "docs/formats.md"


def test_every_format_is_on_the_page() -> None:
    listed = re.findall(r"^\| `([a-z_-]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(FORMATS)
    assert len(listed) == len(set(listed))
