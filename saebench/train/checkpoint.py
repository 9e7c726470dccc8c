"""A call of `train` saved in the middle: one file, replaced atomically, read without running code.

It holds the step (which is the position in the stream), the input scaling, and for every SAE its
parameters, optimiser, controller and firing counts. SAEs are found in it by `key_of` their recipe.
It belongs to one identity, all recipes of a call and the rows they are trained on: another call's
file is an error and not a start.
"""

from __future__ import annotations

import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from saebench.atomic import replacing
from saebench.errors import WeightsError
from saebench.identity import content_hash
from saebench.train.recipe import Recipe

VERSION = 2


def key_of(recipe: Recipe) -> str:
    """What an SAE is called in a checkpoint."""
    return content_hash(recipe.plain())


@dataclass(frozen=True)
class Checkpoint:
    """Where the checkpoint of a call is, whose it is, and how often it is written."""

    path: Path
    identity: str
    every_seconds: float = 300.0

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file as a whole: a kill leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            torch.save({"version": VERSION, "identity": self.identity, **state}, temporary)

    def load(self) -> dict[str, Any] | None:
        """The saved state, on the CPU, or None when there is none. Errors: WeightsError."""
        if not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, UnpicklingError, zipfile.BadZipFile) as error:
            raise WeightsError(
                f"the checkpoint {self.path} cannot be read: {error}",
                "delete it to train from the start",
            ) from None
        if state.get("version") != VERSION or state.get("identity") != self.identity:
            raise WeightsError(
                f"the checkpoint {self.path} is that of another training",
                "delete it, or give another --out",
            )
        return state

    def remove(self) -> None:
        """The training is finished: its file goes, and the folder with the last of them."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.parent.rmdir()
