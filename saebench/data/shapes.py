"""`shapes`: drawn images whose every generative factor is known and kept as a label level.

The main label is the species (`saebench.data.taxonomy`): image i of a split is of species i mod 48.
All else is a nuisance, drawn as h(h(split, i), slot) (`saebench.data.hashing`), so that an image is
a pure function of its split and index. Continuous factors become levels in equal bins.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from saebench.data.dataset import Dataset
from saebench.data.hashing import mix, uniform
from saebench.data.manifest import Manifest
from saebench.data.render import BACKGROUNDS, HUES, INKS, Scene, render
from saebench.data.taxonomy import COLOURS, FAMILIES, GENERA, OUTLINES, SPECIES, TEXTURES
from saebench.specs import DatasetSpec

SIZES = {"train": 4096, "val": 512, "test": 1024}
_KEYS = {"train": 1, "val": 2, "test": 3}
_PIECES = 5  # of clutter
_SLOTS = 18 + 6 * _PIECES

# Factor -> (slot of its draw, names of its equal bins).
BINNED: dict[str, tuple[int, tuple[str, ...]]] = {
    "x": (0, ("left", "centre", "right")),
    "y": (1, ("top", "middle", "bottom")),
    "size": (2, ("small", "medium", "large")),
    "rotation": (3, ("0°", "45°", "90°", "135°", "180°", "225°", "270°", "315°")),
    "ink": (4, INKS),
    "background": (5, BACKGROUNDS),
    "background_hue": (6, ("reddish", "yellowish", "greenish", "bluish", "purplish")),
    "background_value": (7, ("black", "grey", "white")),
    "brightness": (8, ("dim", "normal", "bright")),
    "noise": (9, ("clean", "grainy", "noisy")),
}
# Factor of the species -> (attribute of `Species`, its values).
NAMED: dict[str, tuple[str, tuple[str, ...]]] = {
    "family": ("family", FAMILIES),
    "genus": ("genus", GENERA),
    "species": ("binomial", tuple(species.binomial for species in SPECIES)),
    "shape": ("outline", OUTLINES),
    "texture": ("texture", TEXTURES),
    "colour": ("colour", COLOURS),
}


class Shapes(Dataset):
    """Label levels: the taxonomy and the factors of the species (NAMED), and nuisances (BINNED)."""

    splits = ("train", "val", "test")
    class_names = tuple(species.common for species in SPECIES)

    def __init__(self, spec: DatasetSpec) -> None:
        super().__init__(spec)
        self.label_names = {level: names for level, (_, names) in {**NAMED, **BINNED}.items()}

    def _build_manifest(self, split: str) -> Manifest:
        n = SIZES[split]
        labels = np.arange(n, dtype=np.int64) % len(SPECIES)
        levels = {
            level: np.array([names.index(getattr(s, attribute)) for s in SPECIES])[labels]
            for level, (attribute, names) in NAMED.items()
        }
        for level, (slot, names) in BINNED.items():
            levels[level] = (_draws(split)[:, slot] * len(names)).astype(np.int64)
        ids = tuple(f"shapes/{split}/{index:06d}" for index in range(n))
        return Manifest(self.spec.name, split, ids, labels, levels)

    def _decode(self, split: str, index: int) -> Image.Image:
        return Image.fromarray(_pixels(split, index))


@cache
def _draws(split: str) -> np.ndarray:
    """[n slots] float64 in [0, 1)."""
    return uniform(mix(_image_keys(split)[:, None], np.arange(_SLOTS)))


@cache
def _image_keys(split: str) -> np.ndarray:
    """[n] uint64."""
    return mix(np.uint64(_KEYS[split]), np.arange(SIZES[split]))


@cache  # 3 KiB an image, 17 MB for every image there is
def _pixels(split: str, index: int) -> np.ndarray:
    return render(scene(split, index))


def scene(split: str, index: int) -> Scene:
    """The draws of image `index` as the quantities they stand for."""
    species = SPECIES[index % len(SPECIES)]
    draw = _draws(split)[index].tolist()

    def between(slot: int, low: float, high: float) -> float:
        return low + (high - low) * draw[slot]

    def named(level: str) -> str:
        slot, names = BINNED[level]
        return names[int(draw[slot] * len(names))]

    return Scene(
        outline=species.outline,
        texture=species.texture,
        x=between(0, -0.35, 0.35),
        y=between(1, -0.35, 0.35),
        radius=between(2, 0.38, 0.68),
        rotation=between(3, -1 / 16, 15 / 16),  # bins are centred on their names
        ink=named("ink"),
        background=named("background"),
        back_hue=between(6, 0.0, 1.0),
        back_value=between(7, 0.12, 0.88),
        brightness=between(8, 0.65, 1.15),
        noise=between(9, 0.0, 0.09),
        hue=HUES[species.colour] + between(10, -0.024, 0.024),
        saturation=between(11, 0.62, 1.0),
        value=between(12, 0.62, 1.0),
        phase=(draw[13], draw[14]),
        back_saturation=between(15, 0.0, 0.45),
        back_angle=draw[16],
        clutter=np.array(draw[18:]).reshape(_PIECES, 6),
        noise_key=mix(_image_keys(split)[index : index + 1], np.array([_SLOTS]))[0],
    )
