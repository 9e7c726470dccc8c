"""Decoding of every kind of image file, against values computed without PIL's conversions."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage.io import imread

from saebench.data.decode import BadImage, decode, decode_file

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = np.array([[0, 1, 128, 129, 255, 256, 257], [385, 386, 1000, 32768, 65279, 65407, 65535]])


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def repeated(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


def png(rows: np.ndarray, depth: int, kind: int) -> bytes:
    """A PNG written from the specification. rows: [h bytes], kind: PNG's colour type."""
    width = rows.shape[1] * 8 // (depth * {0: 1, 2: 3, 4: 2, 6: 4}[kind])
    lines = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "GIF", "WEBP"])
def test_colours_of_lossless_files(kind: str):
    image = Image.fromarray(RGB)
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind == "GIF":  # 35 pixels, so a palette of its own colours holds them all
        image = image.quantize(35, dither=Image.Dither.NONE)
        assert len(np.unique(RGB.reshape(-1, 3), axis=0)) == 35
    np.testing.assert_array_equal(pixels(saved(image, kind, **options)), RGB)


def test_gray_one_bit_and_palette():
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(GRAY), "PNG")), repeated(GRAY))
    bits = GRAY > 127
    black_and_white = saved(Image.fromarray(bits), "PNG")
    np.testing.assert_array_equal(pixels(black_and_white), repeated(bits * np.uint8(255)))
    colours = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(GRAY, "P")
    image.putpalette(colours.tobytes())
    np.testing.assert_array_equal(pixels(saved(image, "PNG")), colours[GRAY])
    np.testing.assert_array_equal(pixels(saved(image, "PNG", transparency=3)), colours[GRAY])
    alphas = bytes(range(256))
    np.testing.assert_array_equal(pixels(saved(image, "PNG", transparency=alphas)), colours[GRAY])


def test_transparency_leaves_the_colour_below_it():
    alpha = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)
    rgba = Image.fromarray(np.concatenate([RGB, alpha], axis=2))
    np.testing.assert_array_equal(pixels(saved(rgba, "PNG")), RGB)
    la = Image.fromarray(np.concatenate([GRAY[..., None], alpha], axis=2), "LA")
    np.testing.assert_array_equal(pixels(saved(la, "PNG")), repeated(GRAY))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int):
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :16, 0], upright[16:, 32:, 1] = 255, 255
    # How the camera stored it, so that the tag brings it back (EXIF 2.3, tag 0x0112).
    stored = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x.transpose(1, 0, 2), 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    for kind, atol in (("JPEG", 12), ("PNG", 0), ("WEBP", 0)):
        options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
        found = pixels(saved(image, kind, exif=exif, **options))
        np.testing.assert_allclose(found.astype(int), upright.astype(int), atol=atol)


def test_metadata_that_cannot_be_parsed_leaves_the_pixels():
    broken = saved(Image.fromarray(GRAY), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(pixels(broken), repeated(GRAY))


def test_cmyk_and_adobes_inverted_cmyk():
    inks = np.zeros((16, 16, 4), dtype=np.uint8)
    inks[:8, :, 0], inks[8:, :8, 1], inks[:, 8:, 3] = 200, 100, 51
    expected = np.rint((255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255)
    plain = saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0)
    # PIL writes what Adobe writes: 255 - ink, and an APP14 marker that says so.
    assert b"Adobe" in plain
    np.testing.assert_allclose(pixels(plain).astype(int), expected, atol=3)
    at = plain.index(b"\xff\xee")
    length = int.from_bytes(plain[at + 2 : at + 4], "big")
    unmarked = plain[:at] + plain[at + 2 + length :]  # the stored values are the inks now
    other = np.rint(inks[..., :3] * (inks[..., 3:] / 255.0))
    np.testing.assert_allclose(pixels(unmarked).astype(int), other, atol=3)
    tiff = saved(Image.fromarray(inks, "CMYK"), "TIFF")
    np.testing.assert_allclose(pixels(tiff).astype(int), expected, atol=1)


def test_sixteen_bits_are_scaled_and_not_clipped():
    expected = np.rint(DEEP / 257).astype(np.uint8)
    big = DEEP.astype(">u2")
    gray = png(big.view(np.uint8).reshape(2, -1), 16, 0)
    np.testing.assert_array_equal(pixels(gray), repeated(expected))
    tiff = saved(Image.fromarray(DEEP.astype(np.uint16)), "TIFF")
    np.testing.assert_array_equal(pixels(tiff), repeated(expected))
    pgm = b"P5 7 2 65535\n" + big.tobytes()
    np.testing.assert_array_equal(pixels(pgm), repeated(expected))
    # PIL's reader keeps the high byte of colours and of gray with alpha, within one of the rounded
    # value.
    for kind, channels in ((2, 3), (6, 4), (4, 2)):
        many = np.repeat(big[..., None], channels, axis=2)
        data = png(many.view(np.uint8).reshape(2, -1), 16, kind)
        np.testing.assert_array_equal(pixels(data), repeated((DEEP >> 8).astype(np.uint8)))


def test_floats_are_shares_or_bytes():
    shares = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    expected = repeated(np.rint(shares.astype(np.float64) * 255).astype(np.uint8))
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(shares), "TIFF")), expected)
    bytes_ = saved(Image.fromarray(shares * 255), "TIFF")
    np.testing.assert_array_equal(pixels(bytes_), expected)
    for odd in (shares - 1, shares * 1000, np.where(shares > 0.5, np.nan, shares)):
        with pytest.raises(BadImage, match="its values are"):
            decode(saved(Image.fromarray(odd.astype(np.float32)), "TIFF"))


def tiff(values: np.ndarray, **options: Any) -> bytes:
    """As tifffile writes it."""
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack", **options})
    return file.getvalue()


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_a_tiff_whose_least_value_is_white(dtype: str, compression: str | None):
    white = {"u1": 255, "u2": 65535, "f4": 1}[dtype]
    values = (DEEP / 65535 * white).astype(dtype)
    expected = np.rint((1 - values.astype(np.float64) / white) * 255).astype(np.uint8)
    data = tiff(values, photometric="miniswhite", compression=compression)
    np.testing.assert_array_equal(pixels(data), repeated(expected))
    np.testing.assert_array_equal(
        pixels(tiff(values, compression=compression)),
        repeated(np.rint(values.astype(np.float64) / white * 255).astype(np.uint8)),
    )


def test_sixteen_bits_of_either_byte_order_and_twelve():
    expected = repeated(np.rint(DEEP / 257).astype(np.uint8))
    for order in "<>":
        values = DEEP.astype("u2")
        np.testing.assert_array_equal(pixels(tiff(values, byteorder=order)), expected)
    plain = b"P2 7 2 65535\n" + " ".join(map(str, DEEP.ravel())).encode() + b"\n"
    np.testing.assert_array_equal(pixels(plain), expected)
    deep = saved(Image.fromarray(DEEP.astype(np.uint16)), "JPEG2000", irreversible=False)
    np.testing.assert_array_equal(pixels(deep), expected)
    # Two values of 12 bits in three bytes, the high bits first (TIFF 6.0, FillOrder 1).
    values = np.array([[0, 1, 8, 9], [16, 2048, 4094, 4095]])
    first, second = values.reshape(-1, 2).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
    scaled = repeated(np.rint(values * (255 / 4095)).astype(np.uint8))
    np.testing.assert_array_equal(pixels(tiff_of(packed.astype(np.uint8), 4, 2, 12)), scaled)


def tiff_of(data: np.ndarray, width: int, height: int, bits: int) -> bytes:
    """A gray TIFF of one strip, written from the specification."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = data.size
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = struct.pack("<2sHI", b"II", 42, 8 + data.size) + data.tobytes()
    return start + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "u4"])
def test_numbers_that_do_not_say_what_is_white_are_refused(dtype: str):
    """Of 0 to 127, which would come out as nearly black, or as black where they are negative."""
    values = np.arange(12).reshape(3, 4).astype(dtype)
    for one in (values, -values) if dtype[0] == "i" else (values,):
        with pytest.raises(BadImage, match=r"its values are (signed )?whole numbers.*8 or 16 bits"):
            decode(tiff(one))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind: str):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(pixels(data), np.broadcast_to([255, 0, 0], (4, 6, 3)))


def test_photographs_are_libjpegs_to_the_last_bit(tmp_path: Path):
    """scikit-image reads through imageio: full resolution, no draft mode, no colour profile."""
    big = np.kron(RGB, np.ones((60, 60, 1), np.uint8))
    path = tmp_path / "a.jpg"
    Image.fromarray(big).save(path, quality=90)
    np.testing.assert_array_equal(np.asarray(decode_file(path)), imread(path))


PHOTO = saved(Image.fromarray(np.kron(RGB, np.ones((20, 20, 1), np.uint8))), "JPEG")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>sign in</html>", "web page"),
        (b"\n<html><body>404</body></html>", "web page"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "web page or XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heic"),
        (b"nothing of the kind", "no image that Pillow knows"),
        (PHOTO[: len(PHOTO) // 2], "truncated|not processed"),
        (PHOTO[:30], "Truncated"),
        (saved(Image.fromarray(RGB), "PNG")[:-60], "truncated|broken"),
        (saved(Image.fromarray(RGB), "BMP")[:-9], "truncated"),
        (saved(Image.fromarray(RGB), "WEBP")[:-20], "no image|could not|failed"),
    ],
)
def test_what_is_no_image_says_why(data: bytes, why: str, tmp_path: Path):
    with pytest.raises(BadImage, match=why):
        decode(data)
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    with pytest.raises(BadImage, match=rf"x\.jpg: .*({why})"):
        decode_file(path)


def test_a_decompression_bomb_is_refused():
    bomb = png(np.zeros((1, 1), np.uint8), 8, 0)
    huge = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + huge))
    with pytest.raises(BadImage, match="too large"):
        decode(bomb[:16] + huge + crc + bomb[33:])


def test_every_byte_flipped_is_an_image_or_a_bad_one():
    """Whatever PIL's parsers raise comes out as one error."""
    for data in (PHOTO, saved(Image.fromarray(RGB), "PNG"), saved(Image.fromarray(GRAY), "GIF")):
        for place in range(0, min(len(data), 600), 3):
            damaged = bytearray(data)
            damaged[place] ^= 0xFF
            with suppress(BadImage):
                assert decode(bytes(damaged)).mode == "RGB"


def test_a_missing_file_is_not_a_bad_image(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        decode_file(tmp_path / "none.jpg")
