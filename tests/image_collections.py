"""Small collections of images in the layouts that people have them in."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n02086240", "n07873807")
SPECIES = (
    "00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris",
    "00005_Animalia_Arthropoda_Arachnida_Araneae_Antrodiaetidae_Atypoides_riversi",
    "09990_Plantae_Tracheophyta_Magnoliopsida_Lamiales_Plantaginaceae_Plantago_novae-angliae",
)


def picture(number: int, kind: str = "PNG") -> bytes:
    """An image file of a number below 65,536: its pixels are (number // 256, number % 256, 7)."""
    pixels = np.full((6, 8, 3), (number // 256, number % 256, 7), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def number_of(image: Image.Image) -> int:
    """The number a picture was made of (PNG, or whatever keeps its pixels)."""
    red, green, _ = np.asarray(image)[0, 0].tolist()
    return red * 256 + green


def write(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write files below a root, in an order that is not that of their names."""
    for name in sorted(files, key=lambda name: name[::-1]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])
    return root


def write_tar(path: Path, files: Mapping[str, bytes] | Sequence[tuple[str, bytes]], format=None):
    """Write a tar as Python's tarfile does, members in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = files.items() if isinstance(files, Mapping) else files
    with tarfile.open(path, "w", format=format or tarfile.DEFAULT_FORMAT) as tar:
        for name, data in pairs:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def imagenet_files(per_class: int = 4) -> dict[str, bytes]:
    """`train/` and `val/` by WordNet id, named as ImageNet names its files."""
    files, number = {}, 0
    for label, wnid in enumerate(WNIDS):
        for i in range(per_class):
            files[f"train/{wnid}/{wnid}_{i * 37}.JPEG"] = picture(number)
            stem = f"ILSVRC2012_val_{label + 3 * i + 1:08d}"
            files[f"val/{wnid}/{stem}.JPEG"] = picture(number + 1)
            number += 2
    return files
