"""Image files as PIL images of 8-bit RGB."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def decode_file(path: Path) -> Image:
    """Errors: DataError."""
    return decode(path.read_bytes(), str(path))


def decode(data: bytes, name: str = "") -> Image:
    """Errors: DataError."""
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")
