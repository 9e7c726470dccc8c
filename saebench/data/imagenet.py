"""The 1,000 classes of ImageNet-1k (ILSVRC 2012), in the order of their sorted WordNet ids.

The ids and the WordNet lemmas come from timm's data files, the cleaned names from open_clip
(`IMAGENET_CLASSNAMES`, Radford et al., 2021, as corrected since).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from saebench.data.classes import ClassList

_WNID = re.compile(r"n\d{8}(?!\d)")  # Kaggle's table writes boxes after it


class ImageNet(ClassList):
    """A class is named by its WordNet id, its number, its lemmas, or its cleaned name.

    The numbers are from 0, as text (`"7"`) or as integers. A name that is one class's here and
    another's there (`crane`, `missile`) names neither.
    """

    def __init__(self) -> None:
        self.levels = {}

    @property
    def names(self) -> tuple[str, ...]:
        return _cleaned()

    @property
    def texts(self) -> Mapping[str, tuple[str, ...]]:
        return {"default": _cleaned()}

    def number(self, name: str | int) -> int | None:
        if isinstance(name, int) or (name.isascii() and name.isdigit()):
            return int(name) if 0 <= int(name) < len(wnids()) else None
        if found := _WNID.match(name):
            return _by_wnid().get(found.group())
        return _by_name().get(name)


@cache
def wnids() -> tuple[str, ...]:
    """[1000] WordNet ids in label order, from timm's files (timm itself would import torch)."""
    return tuple(_read("imagenet_synsets.txt").split())


@cache
def lemmas() -> tuple[str, ...]:
    """[1000] the words of each class as WordNet has them: `tench, Tinca tinca`."""
    lines = _read("imagenet_synset_to_lemma.txt").splitlines()
    words = dict(line.split("\t", 1) for line in lines)
    return tuple(words[wnid] for wnid in wnids())


@cache
def _cleaned() -> tuple[str, ...]:
    from open_clip import IMAGENET_CLASSNAMES  # imports torch, so only when names are asked for

    return tuple(IMAGENET_CLASSNAMES)


@cache
def _by_wnid() -> Mapping[str, int]:
    return {wnid: number for number, wnid in enumerate(wnids())}


@cache
def _by_name() -> Mapping[str, int]:
    found: dict[str, set[int]] = defaultdict(set)
    for names in (_cleaned(), lemmas()):
        for number, name in enumerate(names):
            found[name].add(number)
    return {name: numbers.pop() for name, numbers in found.items() if len(numbers) == 1}


def _read(name: str) -> str:
    spec = find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "data" / "_info" / name).read_text(encoding="utf-8")
