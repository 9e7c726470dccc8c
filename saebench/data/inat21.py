"""The 10,000 species of iNaturalist 2021, whose folders carry number and taxonomy.

    00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris
    number kingdom phylum class order family genus epithet

The number is the label, so a partial copy has the labels of the full one. Common names, and the
species a partial copy lacks, come from the `categories` of `val.json`, `train_mini.json` or
`train.json` where one of them lies beside the folders (Van Horn et al., CVPR 2021).
"""

from __future__ import annotations

import json
import mmap
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saebench.data.classes import ClassList
from saebench.errors import DataError

COUNT = 10_000
RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")
TABLES = ("val.json", "train_mini.json", "train.json")  # the smallest first
_LARGEST = 1 << 26  # bytes; the list of 10,000 species is 5 MB
_FOLDER = re.compile(r"(\d{5})_" + "_".join(["([^_]+)"] * 6) + r"_(.+)")


@dataclass(frozen=True)
class Species:
    """One class."""

    ranks: tuple[str, ...]  # kingdom to genus
    epithet: str
    common: str = ""

    @property
    def scientific(self) -> str:
        """Genus and epithet: `Lumbricus terrestris`."""
        return f"{self.ranks[-1]} {self.epithet}"

    @property
    def taxonomic(self) -> str:
        """All ranks, kingdom first, as BioCLIP's taxonomic texts have them."""
        return " ".join((*self.ranks, self.epithet))


class INat21(ClassList):
    """A class is named by its folder, its number, or (where it is known) its scientific name.

    Levels: kingdom, phylum, class, order, family, genus. Texts are there when every species is
    known, from the folders or the table: a text classifier over a part of the classes would be
    another one. `common` is there with the table; a species without a common name has its
    scientific one.
    """

    def __init__(self, names: Sequence[str | int], root: Path | None) -> None:
        listed = _table(root)
        self._has_common = bool(listed)
        self._species: dict[int, Species] = dict(listed)
        for name in names:
            if isinstance(name, str) and (match := _FOLDER.fullmatch(name)):
                number, *ranks, epithet = match.groups()
                found = Species(tuple(ranks), epithet.replace("_", " "))
                self._species.setdefault(int(number), found)
        self._by_name = _unique({n: s.scientific for n, s in self._species.items()})
        numbers = {self.number(name) for name in names} - {None}
        self.levels = _levels(self._species, complete=numbers <= set(self._species))

    @property
    def names(self) -> tuple[str, ...]:
        species = self._species
        return tuple(
            species[number].scientific if number in species else f"species {number:05d}"
            for number in range(COUNT)
        )

    @property
    def texts(self) -> Mapping[str, tuple[str, ...]]:
        if len(self._species) < COUNT:
            return {}
        species = [self._species[number] for number in range(COUNT)]
        scientific = tuple(one.scientific for one in species)
        texts = {
            "default": scientific,
            "scientific": scientific,
            "taxonomic": tuple(one.taxonomic for one in species),
        }
        if self._has_common:
            texts["common"] = tuple(one.common or one.scientific for one in species)
        return texts

    def number(self, name: str | int) -> int | None:
        if isinstance(name, str):
            if match := _FOLDER.fullmatch(name):
                name = match.group(1)
            elif not (name.isascii() and name.isdigit()):
                return self._by_name.get(name)
        return int(name) if 0 <= int(name) < COUNT else None


def _levels(
    species: Mapping[int, Species], *, complete: bool
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Each rank's values, sorted; `unknown` is one of them where labels occur without taxonomy.

    One name below two parents (Oenanthe is a genus of birds and one of plants) is two values.
    """
    levels = {}
    for depth, rank in enumerate(RANKS if species else ()):
        lines = {number: one.ranks[: depth + 1] for number, one in species.items()}
        homonyms: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for line in lines.values():
            homonyms[line[-1]].add(line)
        called = {
            line: name if len(same) == 1 else f"{name} ({', '.join(line[:-1])})"
            for name, same in homonyms.items()
            for line in same
        }
        names = tuple(sorted(set(called.values())))
        place = {name: value for value, name in enumerate(names)}
        values = np.full(COUNT, 0 if complete else len(names), dtype=np.int64)
        for number, line in lines.items():
            values[number] = place[called[line]]
        levels[rank] = (names if complete else (*names, "unknown"), values)
    return levels


def _unique(names: Mapping[int, str]) -> dict[str, int]:
    found: dict[str, list[int]] = defaultdict(list)
    for number, name in names.items():
        found[name].append(number)
    return {name: numbers[0] for name, numbers in found.items() if len(numbers) == 1}


def _table(root: Path | None) -> dict[int, Species]:
    """The species of the first official table below root. Errors: DataError for a damaged one."""
    for name in TABLES:
        path = root / name if root else None
        if path is None or not path.is_file() or not path.stat().st_size:
            continue
        try:
            return {
                int(one["id"]): Species(
                    tuple(one[rank] for rank in RANKS),
                    one["specific_epithet"],
                    one.get("common_name") or "",
                )
                for one in _categories(path)
            }
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: its categories cannot be read: {error!r}",
                "fetch the file again, or remove it: common names are then not there",
            ) from None
    return {}


def _categories(path: Path) -> list[dict[str, str]]:
    """The list under `categories`. The rest, hundreds of megabytes of images, is not parsed."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(b'"categories"')
        start = data.find(b"[", start) if start >= 0 else -1
        if start < 0:
            raise ValueError("there are none")
        text = data[start : start + _LARGEST].decode("utf-8", errors="ignore")  # may cut a letter
    return json.JSONDecoder().raw_decode(text)[0]
