"""`idx`: images and labels in IDX files, the form of MNIST, EMNIST, KMNIST and Fashion-MNIST.

A split is a stem: the files `<stem>-images-idx3-ubyte` and `<stem>-labels-idx1-ubyte` somewhere
below `<data root>/<dataset>`, each perhaps gzipped (`.gz`). An IDX file is 0 0 8 k, then k sizes as
big-endian 32-bit integers, then the bytes: images [n rows columns], labels [n]
(http://yann.lecun.com/exdb/mnist/).

An image's id is `<split>/<its place in the file>`.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saebench.data.access import Access
from saebench.data.dataset import Dataset
from saebench.data.manifest import Manifest
from saebench.errors import DataError, SpecError
from saebench.specs import DatasetSpec


class Idx(Dataset):
    """Options: `stems` (split -> stem), `transposed`, `download` (the page that offers the files).

    `transposed = true` says that rows and columns are swapped in the file, as in EMNIST. The
    entry's `classes` name the labels 0, 1, … in their order.
    """

    def __init__(self, spec: DatasetSpec, access: Access) -> None:
        super().__init__(spec, options=("stems", "transposed", "download"))
        if isinstance(spec.classes, str) or not isinstance(spec.options.get("stems"), Mapping):
            raise SpecError(
                f"{spec.path or spec.name}: an `idx` dataset needs the names of its classes and "
                "the stems of its files",
                'write  classes = ["zero", "one"]  and  [options]  stems.train = "…"',
            )
        self.stems: dict[str, str] = dict(spec.options["stems"])
        self.splits = tuple(self.stems)
        self.class_names = spec.classes
        self.label_names = {}
        self.folder = access.root / spec.name if access.root else None
        self._arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the pixels: a worker process reads them itself."""
        return {**self.__dict__, "_arrays": {}}

    def _split(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(images [n h w] uint8, labels [n] uint8)."""
        if split not in self._arrays:
            images = read_idx(self._file(f"{self.stems[split]}-images-idx3-ubyte"), 3)
            labels = read_idx(self._file(f"{self.stems[split]}-labels-idx1-ubyte"), 1)
            if len(images) != len(labels):
                raise DataError(
                    f"dataset '{self.spec.name}', split '{split}' has {len(images)} images "
                    f"and {len(labels)} labels",
                    "the two files do not belong together: download them again",
                )
            if labels.size and labels.max() >= len(self.class_names):
                raise DataError(
                    f"dataset '{self.spec.name}', split '{split}': a label is {labels.max()}, "
                    f"and there are {len(self.class_names)} names",
                    f"give every label a name in  classes  of {self.spec.path}",
                )
            self._arrays[split] = images, labels
        return self._arrays[split]

    def _file(self, name: str) -> Path:
        if self.folder is not None:
            for found in (name, f"{name}.gz"):
                paths = sorted(self.folder.rglob(found))
                if paths:
                    return paths[0]
        page = self.spec.options.get("download", self.spec.paper)
        place = self.folder or f"<data root>/{self.spec.name}"
        hint = f"put {name}.gz into {place}" + (f"; it is to be had at {page}" if page else "")
        if self.folder is None:
            hint += "\n    and say  --data-root FOLDER  (or SAEBENCH_DATA=FOLDER)"
        raise DataError(f"dataset '{self.spec.name}': there is no {name} in {place}", hint)

    def fetch(self) -> str:
        """See that the files, which have to be downloaded by hand, are there and whole."""
        sizes = [f"{split} {len(self._split(split)[1]):,} images" for split in self.splits]
        return f"{self.folder}: {', '.join(sizes)}"

    def _build_manifest(self, split: str) -> Manifest:
        labels = self._split(split)[1].astype(np.int64)
        ids = tuple(f"{split}/{row:06d}" for row in range(len(labels)))
        return Manifest(self.spec.name, split, ids, labels)

    def _decode(self, split: str, index: int) -> Image.Image:
        pixels = self._split(split)[0][index]
        if self.spec.options.get("transposed", False):
            pixels = pixels.T
        return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of bytes in an IDX file, gzipped or not. Errors: DataError."""
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
        start = 4 + 4 * dimensions
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
        if data[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"it is not an IDX file of {dimensions} dimensions of bytes")
        if len(data) - start != int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"it holds {len(data) - start} bytes, not {list(shape)}")
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", "download it again") from error
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
