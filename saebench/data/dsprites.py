"""`dsprites`: 737,280 drawn sprites, each combination of five factors once, every factor a label.

Source: Matthey, Higgins, Hassabis and Lerchner, dSprites (2017), the NumPy archive
`dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz`, put into `<data root>/dsprites`. Its `imgs`
[n 64 64] uint8 are 0 or 1; `latents_classes` [n 6] are colour (always 0), shape, scale,
orientation, x and y. Images are white on black. The main label is the shape.

There are no splits: `holdout` is the share that is `test`, the first of the class-stratified order
(`saebench.data.manifest`) of all rows. An image's id is `dsprites/<its row in the archive>`.

Of the archive, `imgs` are 3 GB once unpacked. They are kept as bits in the store, 512 bytes an
image, and mapped into memory.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image

from saebench import paths
from saebench.atomic import remove_leftovers, replacing, unwritable
from saebench.data.access import Access
from saebench.data.dataset import Dataset
from saebench.data.manifest import Manifest, stratified_order
from saebench.errors import DataError
from saebench.specs import DatasetSpec

ARCHIVE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
PAGE = "https://github.com/google-deepmind/dsprites-dataset"
SIZE = 64
SHAPES = ("square", "ellipse", "heart")
# Level -> (its column of `latents_classes`, the names of its values).
FACTORS: dict[str, tuple[int, tuple[str, ...]]] = {
    "shape": (1, SHAPES),
    "scale": (2, tuple(f"{0.5 + i / 10:.1f}" for i in range(6))),
    "orientation": (3, tuple(f"{i * 360 / 39:.0f}°" for i in range(40))),  # 0° and 360° both occur
    "x": (4, tuple(f"{i / 31:.2f}" for i in range(32))),
    "y": (5, tuple(f"{i / 31:.2f}" for i in range(32))),
}
_ROWS = 4096  # unpacked at a time


class DSprites(Dataset):
    """Label levels: the five factors."""

    splits = ("train", "test")
    class_names = SHAPES

    def __init__(self, spec: DatasetSpec, access: Access) -> None:
        super().__init__(spec)
        self.label_names = {level: names for level, (_, names) in FACTORS.items()}
        self.folder = access.root / spec.name if access.root else None
        self._bits: np.ndarray | None = None
        self._chosen: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped bits, which a worker process maps itself, and what it never needs."""
        kept = {key: value for key, value in self.__dict__.items() if key != "_factors"}
        return {**kept, "_bits": None}

    @cached_property
    def archive(self) -> Path:
        """The NumPy archive. Errors: DataError (it is not there)."""
        place = self.folder or f"<data root>/{self.spec.name}"
        if self.folder is None or not (self.folder / ARCHIVE).is_file():
            hint = f"put {ARCHIVE} into {place}; it is to be had at {PAGE}"
            if self.folder is None:
                hint += "\n    and say  --data-root FOLDER  (or SAEBENCH_DATA=FOLDER)"
            raise DataError(f"dataset '{self.spec.name}': there is no {ARCHIVE} in {place}", hint)
        return self.folder / ARCHIVE

    @cached_property
    def _factors(self) -> np.ndarray:
        """[n 6] int64, the rows of the archive."""
        factors = read_array(self.archive, "latents_classes")
        if factors.ndim != 2 or factors.shape[1] != 6 or factors.dtype.kind not in "iu":
            raise DataError(
                f"{self.archive}: latents_classes is {factors.dtype}{list(factors.shape)}",
                f"download it again from {PAGE}",
            )
        return factors.astype(np.int64)

    def _rows(self, split: str) -> np.ndarray:
        """Rows of the archive in the split, ascending."""
        if not self._chosen:
            labels = self._factors[:, 1]
            order = stratified_order("dsprites", tuple(map(_id, range(len(labels)))), labels)
            end = round(len(labels) * (self.spec.holdout or 0.1))
            self._chosen = {"test": np.sort(order[:end]), "train": np.sort(order[end:])}
        return self._chosen[split]

    def fetch(self) -> str:
        """Unpack the archive, which has to be downloaded by hand."""
        return f"{self.archive}: {len(unpacked(self.archive)):,} images, unpacked"

    def _build_manifest(self, split: str) -> Manifest:
        rows = self._rows(split)
        levels = {level: self._factors[rows, column] for level, (column, _) in FACTORS.items()}
        ids = tuple(map(_id, rows.tolist()))
        return Manifest(self.spec.name, split, ids, levels["shape"], levels)

    def _decode(self, split: str, index: int) -> Image.Image:
        if self._bits is None:
            self._bits = unpacked(self.archive)
        sprite = np.unpackbits(self._bits[self._rows(split)[index]], axis=-1)
        return Image.fromarray(sprite * np.uint8(255)).convert("RGB")


def _id(row: int) -> str:
    return f"dsprites/{row:06d}"


def unpacked(archive: Path) -> np.ndarray:
    """[n 64 8] uint8, mapped: the rows of each sprite as bits. Written to the store at first use.

    Errors: DataError (a damaged archive), WriteError (the store).
    """
    stat = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode())
    path = paths.user_store() / "dsprites" / f"{key.hexdigest()[:16]}.npy"
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        remove_leftovers(path.parent)
        with replacing(path) as temporary, temporary.open("wb") as file:
            for part in _packed(archive):
                file.write(part)
    return np.load(path, mmap_mode="r")


def _packed(archive: Path) -> Iterator[bytes]:
    """The bytes of the `.npy` file of all sprites as bits."""
    with _opened(archive) as z:
        shape, order, dtype, stream = _header(z, "imgs.npy")
        if shape[1:] != (SIZE, SIZE) or dtype != np.uint8 or order != "C":
            raise ValueError(f"imgs is {dtype}{list(shape)}, not uint8[n, {SIZE}, {SIZE}]")
        head = io.BytesIO()
        packed = {"descr": "|u1", "fortran_order": False, "shape": (shape[0], SIZE, SIZE // 8)}
        np.lib.format.write_array_header_1_0(head, packed)
        yield head.getvalue()
        for first in range(0, shape[0], _ROWS):
            n = min(_ROWS, shape[0] - first)
            pixels = np.frombuffer(_exactly(stream, n * SIZE * SIZE), np.uint8)
            yield np.packbits(pixels.reshape(n, SIZE, SIZE), axis=-1).tobytes()


def read_array(archive: Path, name: str) -> np.ndarray:
    """One array of the archive. Errors: DataError."""
    with _opened(archive) as z:
        shape, order, dtype, stream = _header(z, f"{name}.npy")
        n = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return np.frombuffer(_exactly(stream, n), dtype).reshape(shape, order=order)


def _header(
    z: zipfile.ZipFile, name: str
) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype, IO[bytes]]:
    """Shape, order and type of an array of the archive, and the stream its bytes follow in.

    The archive also holds a pickled dictionary: for that it is not given to `np.load`.
    """
    stream = z.open(name)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{name} is not a NumPy file of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects")
    return shape, "F" if fortran else "C", dtype, stream


def _exactly(stream: IO[bytes], n: int) -> bytes:
    data = stream.read(n)
    if len(data) != n:
        raise EOFError(f"it ends after {len(data)} of {n} bytes")
    return data


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) as z:
            yield z
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{archive} cannot be read: {error}", f"download it again from {PAGE}"
        ) from error
