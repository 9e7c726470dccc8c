"""The taxonomy of `shapes`: 6 families > 12 genera > 48 species.

A genus is one outline. Its four species cross two textures with two colours, so that outline,
texture and colour are all needed to tell a species. The pairs are dealt out so that every texture
occurs in half of the genera and every colour in three of them: neither alone tells the family.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product

TEXTURES = ("plain", "striped", "spotted", "checked")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")

# Family, then its two genera as (Latin name, grammatical gender, outline).
_TREE = (
    ("Rotundidae", (("Discus", "m", "disc"), ("Ovum", "n", "oval"))),
    ("Trigonidae", (("Trigonum", "n", "triangle"), ("Sagitta", "f", "arrowhead"))),
    ("Quadridae", (("Quadra", "f", "square"), ("Virga", "f", "bar"))),
    ("Stellidae", (("Stella", "f", "star"), ("Scintilla", "f", "sparkle"))),
    ("Crucidae", (("Crux", "f", "cross"), ("Tau", "n", "tee"))),
    ("Anulidae", (("Anulus", "m", "ring"), ("Luna", "f", "crescent"))),
)
_STEMS = dict(
    zip(
        COLOURS,
        ("rubri", "auranti", "flavi", "viridi", "cyani", "caeruli", "purpuri", "rosei"),
        strict=True,
    )
)
_ENDINGS = {
    "plain": {"m": "laevis", "f": "laevis", "n": "laeve"},
    "striped": {"m": "striatus", "f": "striata", "n": "striatum"},
    "spotted": {"m": "punctatus", "f": "punctata", "n": "punctatum"},
    "checked": {"m": "tessellatus", "f": "tessellata", "n": "tessellatum"},
}


@dataclass(frozen=True)
class Species:
    """One class of `shapes`."""

    family: str
    genus: str
    epithet: str
    outline: str
    texture: str
    colour: str

    @property
    def binomial(self) -> str:
        """For example `Discus rubristriatus`."""
        return f"{self.genus} {self.epithet}"

    @property
    def common(self) -> str:
        """For example `red striped disc`."""
        return f"{self.colour} {self.texture} {self.outline}"


def _species() -> tuple[Species, ...]:
    pairs = tuple(combinations(TEXTURES, 2))
    found = []
    genera = [(family, *genus) for family, two in _TREE for genus in two]
    for number, (family, genus, gender, outline) in enumerate(genera):
        colours = (COLOURS[number % 8], COLOURS[(number + 4) % 8])
        for texture, colour in product(pairs[number % 6], colours):
            epithet = _STEMS[colour] + _ENDINGS[texture][gender]
            found.append(Species(family, genus, epithet, outline, texture, colour))
    return tuple(found)


SPECIES: tuple[Species, ...] = _species()
FAMILIES: tuple[str, ...] = tuple(family for family, _ in _TREE)
GENERA: tuple[str, ...] = tuple(genus for _, two in _TREE for genus, _, _ in two)
OUTLINES: tuple[str, ...] = tuple(outline for _, two in _TREE for _, _, outline in two)
