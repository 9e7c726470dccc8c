"""Image files as PIL images of 8-bit RGB, as a person looking at the file would see them.

    orientation   applied (EXIF 0x0112)
    gray, 1 bit   the same value in all three channels
    palette       its colours
    CMYK          R = (255 - C)(255 - K) / 255 and so on; a JPEG that Adobe's marker says so of
                  stores 255 minus the inks, one without it the inks (PIL does not look)
    16 bit        gray: round(v / 257), so that 65535 is 255 (PIL's convert("RGB") would clip at
                  255); colours, and gray with transparency: v / 256 rounded down, which is all that
                  PIL's reader leaves
    12 bit        gray: round(255 v / 4095)
    float         0..1, or 0..255 where a value is above 1, rounded
    min is white  inverted, whatever the number of bits (PIL does so up to 8 bits only)
    transparency  left out: the colour below it stays, as with convert("RGB") everywhere in the
                  field. Blending onto white would be another choice of pixels than every published
                  number rests on.
    animation     the first frame

Signed and 32-bit whole numbers are refused: nothing in a file says which of them is white.

Nothing else is changed: no colour profile is applied, and JPEGs are never decoded at a smaller
scale (PIL's draft mode), which would be faster and give other pixels.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF 6.0
_MIN_IS_WHITE, _SIGNED = 0, 2  # values of the last two
_TO_16_BITS = ("PNG", "PPM", "JPEG2000")  # PIL scales what these have above 8 bits to 0..65535
_CONVERT = "convert it to unsigned 8 or 16 bits"
_MARKUP = (b"<!doc", b"<html", b"<?xml", b"<head", b"<body")


class BadImage(ValueError):
    """Bytes that are no image that can be decoded; the message is a half sentence."""


def decode_file(path: Path) -> Image:
    """[h w] RGB. Errors: BadImage naming the file; OSError where it cannot be read."""
    return decode(path.read_bytes(), str(path))


def decode(data: bytes, place: str = "") -> Image:
    """[h w] RGB. place: where the bytes are from. Errors: BadImage, after the place."""
    try:
        return _decoded(data)
    except BadImage as error:
        raise BadImage(f"{place}: {error}" if place else str(error)) from None


def _decoded(data: bytes) -> Image:
    from PIL import Image

    if not data:
        raise BadImage("it is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, about metadata and transparency
            image = Image.open(io.BytesIO(data))
            image.load()
            _turn(image)
            return to_rgb(image)
    except Image.UnidentifiedImageError:
        raise BadImage(_what_else(data)) from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"it is refused as too large: {error}") from None
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # PIL's readers raise whatever their parsers meet
        raise BadImage(str(error) or type(error).__name__) from None


def to_rgb(image: Image) -> Image:
    """A loaded image of any mode as 8-bit RGB. Errors: BadImage for numbers that are no colours."""
    from PIL import ImageChops

    if image.mode == "RGB":
        return image
    if _SIGNED in getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, ()):
        raise BadImage(f"its values are signed whole numbers: {_CONVERT}")
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_numbers(image)
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)
    return image.convert("RGB")


def _turn(image: Image) -> None:
    from PIL import ImageOps

    with suppress(Exception):  # metadata that cannot be parsed says nothing of the pixels
        ImageOps.exif_transpose(image, in_place=True)


def _from_numbers(image: Image) -> Image:
    from PIL import Image

    v_hw = np.asarray(image).astype(np.float64)
    if image.mode != "F":
        white = _white(image)
    elif np.isfinite(v_hw).all() and v_hw.min() >= 0 and v_hw.max() <= 255:
        white = 1 if v_hw.max() <= 1 else 255
    else:
        raise BadImage(f"its values are {v_hw.min():g} to {v_hw.max():g}, not 0 to 1 or 0 to 255")
    v_hw *= 255 / white
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _MIN_IS_WHITE:
        v_hw = 255 - v_hw
    return Image.fromarray(np.rint(v_hw).astype(np.uint8)).convert("RGB")


def _white(image: Image) -> int:
    """The largest value that a gray image of whole numbers may have. Errors: BadImage: unknown."""
    bits = 16 if image.format in _TO_16_BITS else 0
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(_BITS, (0,))[0]
    if not 8 <= bits <= 16:
        raise BadImage(f"its values are whole numbers of {bits or 'unknown'} bits: {_CONVERT}")
    return 2**bits - 1


def _what_else(data: bytes) -> str:
    """What bytes are that no reader of PIL knows."""
    start = data[:512].lstrip().lower()
    if start.startswith(_MARKUP):
        return "it is a web page or XML, not an image: was it downloaded without signing in?"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the image: run  git lfs pull"
    if data[4:8] == b"ftyp":
        return f"it is of a kind that Pillow does not read ({ascii(data[8:12])[2:-1]})"
    return f"it is no image that Pillow knows; it starts with {data[:8]!r}"
