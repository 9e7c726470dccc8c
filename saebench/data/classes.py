"""The classes of a dataset in label order: which number a name has, and what it is called in texts.

`DatasetSpec.classes` is the list, or the name of one. A list that is known beforehand
(`imagenet-1k`, `inat21`, or written in the entry) gives a class the same number in every form of
the dataset and in a partial copy of it. Without one, classes have the numbers that a hub dataset
gives its names; else the names are those found over all splits, sorted (by number, where all of
them are whole numbers), so that a class has one number in every split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from unicodedata import normalize

import numpy as np

from saebench.errors import DataError, SpecError
from saebench.specs import DatasetSpec

LISTS = ("imagenet-1k", "inat21")
"""The class lists that are known beforehand."""
MANY = 100_000  # classes: a label from there on is one where the labels are not much fewer


class ClassList(ABC):
    """c classes, numbered 0 to c-1.

    `levels`: coarser label levels, level -> (names of its values, int64 [c] the value of a class).
    """

    levels: Mapping[str, tuple[tuple[str, ...], np.ndarray]]

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """[c] what a class is called in tables."""

    @property
    @abstractmethod
    def texts(self) -> Mapping[str, tuple[str, ...]]:
        """Kind -> [c] names to be put in templates; `default` where there are texts at all."""

    @abstractmethod
    def number(self, name: str | int) -> int | None:
        """The label a source's own name or number of a class stands for; None: it is none."""


def needs_names(spec: DatasetSpec) -> bool:
    """Whether the class list depends on the names found, so that every split has to be listed."""
    return spec.classes in ("", "inat21")


def class_list(spec: DatasetSpec, names: Sequence[str | int], root: Path | None) -> ClassList:
    """The class list of an entry.

    names: everything the dataset's labels are called, over all splits. root: the dataset's folder,
    where a list may find more about its classes. Errors: SpecError for an unknown list, DataError
    for names that cannot be numbered.
    """
    if not spec.classes:
        return Found(names, f"dataset '{spec.name}'")
    if not isinstance(spec.classes, str):
        return Listed(spec.classes)
    if spec.classes == "imagenet-1k":
        from saebench.data.imagenet import ImageNet

        return ImageNet()
    if spec.classes == "inat21":
        from saebench.data.inat21 import INat21

        return INat21(names, root)
    near = get_close_matches(spec.classes, LISTS, n=1)
    raise SpecError(
        f"{spec.path or spec.name}: no class list is called '{spec.classes}'",
        f'did you mean classes = "{near[0]}"?'
        if near
        else f"class lists: {', '.join(LISTS)}; without one the names found are sorted",
    )


def numbers(classes: ClassList, names: Sequence[str | int], where: str) -> np.ndarray:
    """int64 [len(names)], the label of each. Errors: DataError naming those that have none."""
    found = [classes.number(name) for name in names]
    if unknown := [name for name, number in zip(names, found, strict=True) if number is None]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise DataError(
            f"{where}: '{unknown[0]}'{more} is not one of the {len(classes.names)} classes",
            "remove what is no class from the folder, or name another class list in the entry",
        )
    return np.array(found, dtype=np.int64)


def own_numbers(classes: ClassList, names: Sequence[str], where: str) -> np.ndarray:
    """int64 [len(names)], the label of each of the names that a dataset numbers itself.

    Its numbers hold where they are as many as the classes and no name says otherwise: the same
    class is called now `crane`, now `construction crane`. Errors: those of `numbers`.
    """
    found = [classes.number(name) for name in names]
    known = any(number is not None for number in found) or isinstance(classes, Listed)
    agree = all(number in (None, place) for place, number in enumerate(found))
    if known and agree and len(names) == len(classes.names):
        return np.arange(len(names))
    return numbers(classes, names, where)


class Listed(ClassList):
    """Names in label order. A dataset may call a class by its name or its number.

    Where the names are whole numbers that cannot be places in the list (`["20210412", …]`), a
    number is a name.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.levels = {}
        self._names = tuple(plain(name) for name in names)
        self._number = {name: number for number, name in enumerate(self._names)}
        self._by_name = _are_numbers(self._names) and max(map(int, names), default=0) >= max(
            MANY, 2 * len(names)
        )

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @property
    def texts(self) -> Mapping[str, tuple[str, ...]]:
        return {"default": tuple(name.replace("_", " ") for name in self._names)}

    def number(self, name: str | int) -> int | None:
        if isinstance(name, int) and not self._by_name:
            return name if 0 <= name < len(self._names) else None
        return self._number.get(plain(str(name)))


class Found(ClassList):
    """The names that occur, sorted. Labels that are numbers already keep them.

    where: what a message calls the labels. Errors: DataError where numbers and names are mixed, or
    numbers are so large that almost all classes below them would be empty.
    """

    def __init__(self, names: Sequence[str | int], where: str = "labels") -> None:
        self.levels = {}
        given = {name for name in names if isinstance(name, int)}
        called = {plain(name) for name in names if isinstance(name, str)}
        if given and called:
            raise DataError(
                f"{where}: some labels are numbers ({min(given)}) and some are names "
                f"('{min(called)}')",
                "write all labels in one way",
            )
        if given and max(given) >= max(MANY, 100 * len(given)):
            raise DataError(
                f"{where}: {len(given)} different labels are there, and the largest is "
                f"{max(given)}: they do not number classes",
                "is this a column of ids? Name that of the classes; or, if each is a class, list "
                f'them in the entry:  classes = ["{min(given)}", "…"]',
            )
        self._numbered = bool(given)
        if self._numbered:
            self._names = tuple(str(number) for number in range(max(given) + 1))
        else:
            self._names = tuple(sorted(called, key=_key(called)))
        self._number = {name: number for number, name in enumerate(self._names)}

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @property
    def texts(self) -> Mapping[str, tuple[str, ...]]:
        if self._numbered:
            return {}  # a number says nothing to a text tower
        return {"default": tuple(name.replace("_", " ") for name in self._names)}

    def number(self, name: str | int) -> int | None:
        if isinstance(name, int):
            return name if 0 <= name < len(self._names) else None
        return self._number.get(plain(name))


def plain(text: str) -> str:
    """A text in Unicode's composed form (NFC). File systems differ in how they write an accent."""
    return text if text.isascii() else normalize("NFC", text)


def _are_numbers(names: Collection[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names)


def _key(names: set[str]):
    """How names are sorted: as text, or by number where every one is a whole number."""
    if _are_numbers(names):
        return lambda name: (int(name), name)
    return lambda name: name
