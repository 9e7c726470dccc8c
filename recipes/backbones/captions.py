"""The captions that the CLIP backbones learn from, and of which classes each is true.

`coarse` (tiny-clip) names a digit, or one or two of the three attributes of a species: "a photo of
a striped disc." No caption gives all three, so telling species apart takes composition.
`taxonomic` (tiny-bioclip) names species as BioCLIP does (Stevens et al., 2024): common name,
binomial, family with binomial, and both with the common name, mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from saebench.data.digits import NAMES
from saebench.data.taxonomy import SPECIES, Species

N_CLASSES = len(NAMES) + len(SPECIES)  # digits first, as in the supervised heads


@dataclass(frozen=True, eq=False)
class Captions:
    """u texts; true_cu [classes u] bool says of which classes each text is true."""

    texts: tuple[str, ...]
    true_cu: torch.Tensor

    def draw(self, classes_b: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """[b] one true caption for each class, all of them equally likely."""
        return torch.multinomial(self.true_cu[classes_b].float(), 1, generator=generator)[:, 0]


def coarse(digit_templates: Sequence[str], shape_templates: Sequence[str]) -> Captions:
    """Digits by name; shapes by one or two attributes."""
    pairs = [(t.format(name), c) for c, name in enumerate(NAMES) for t in digit_templates]
    for number, species in enumerate(SPECIES):
        for phrase in _attributes(species):
            pairs += [(t.format(phrase), len(NAMES) + number) for t in shape_templates]
    return _collect(pairs)


def taxonomic(shape_templates: Sequence[str]) -> Captions:
    """Shapes by species."""
    pairs = []
    for number, species in enumerate(SPECIES):
        taxon = f"{species.family} {species.binomial}"
        names = (species.common, species.binomial, taxon, f"{taxon}, a {species.common}")
        pairs += [(t.format(n), len(NAMES) + number) for n in names for t in shape_templates]
    return _collect(pairs)


def _attributes(species: Species) -> list[str]:
    """One or two of (colour, texture, outline), in this order; an outline not named is a shape."""
    words = (species.colour, species.texture, species.outline)
    chosen = [c for size in (1, 2) for c in combinations(range(3), size)]
    return [" ".join([words[i] for i in c] + ["shape"] * (2 not in c)) for c in chosen]


def _collect(pairs: Iterable[tuple[str, int]]) -> Captions:
    pairs = list(pairs)
    texts = tuple(dict.fromkeys(text for text, _ in pairs))
    place = {text: u for u, text in enumerate(texts)}
    true_cu = torch.zeros(N_CLASSES, len(texts), dtype=torch.bool)
    for text, c in pairs:
        true_cu[c, place[text]] = True
    return Captions(texts, true_cu)
