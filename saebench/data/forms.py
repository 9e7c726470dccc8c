"""The forms a collection of images comes in: what each lists, and how it reads one image.

A form (folders, tar shards, a hub dataset) lists rows: a path-like key, what the source calls the
label, and, for itself, where the image is. `saebench.data.images` makes ids and labels of that by
one rule, so that a dataset has the same manifest in every form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

ALL = "all"
"""The one split a form lists where `holdout` says how to cut it."""


@dataclass(frozen=True, eq=False)
class Column:
    """Labels of n rows: `values` [n] int64, `names[v]` what the source calls value v.

    names None: the values are numbers that mean themselves. ordered: the values are the dataset's
    own labels, and not just numbers that its names were given in passing.
    """

    values: np.ndarray
    names: tuple[str, ...] | None = None
    ordered: bool = False


@dataclass(frozen=True, eq=False)
class Listing:
    """The n rows of one split, in an order that does not change from one listing to the next.

    keys: path-like, `/` between parts, below the split: `n01440764/n01440764_10026.JPEG`.
    label: the main label. levels: label level -> its column.
    stratified: False for the first rows of a stream, which are measured as they come.
    """

    keys: Sequence[str]
    label: Column
    levels: Mapping[str, Column] = field(default_factory=dict)
    stratified: bool = True


class Form(ABC):
    """A collection in one form, as it lies on this machine. Picklable, for worker processes.

    splits: those that are there (`all` alone, where the entry has a holdout). root: the folder it
    lies in, or None. revision: of a hub dataset, the commit that is read.
    """

    splits: tuple[str, ...]
    root: Path | None = None
    revision: str = ""
    has_captions: bool = False

    @abstractmethod
    def listing(self, split: str) -> Listing:
        """All rows of a split. Errors: DataError."""

    @abstractmethod
    def read(self, split: str, row: int) -> Image:
        """Decode one row's image (`saebench.data.decode`). Errors: DataError, OSError."""

    def captions(self, split: str) -> Sequence[str]:
        """The caption of each row of `listing`, '' where there is none. Errors: DataError."""
        return ()

    def missing(self, split: str) -> str:
        """Why a split that is not among `splits` is not there, as a half sentence."""
        return f"its splits: {', '.join(self.splits)}"

    def fetch(self) -> str:
        """Get what has to be downloaded, ahead of time; say in a few words what that was."""
        return ""
