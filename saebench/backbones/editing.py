"""Activations changed at several sites of one forward pass.

At a boundary the tensor between two steps is exchanged; within a step a hook exchanges what a
module is given or returns. Each edit is given all tokens of its site as they arrive there [b t d],
whatever has been changed before, and returns them as they go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from saebench.backbones.hooks import hooked
from saebench.backbones.places import Depth, Sites
from saebench.backbones.sites import laid_out
from saebench.errors import UsageError

Edit = Callable[[Tensor], Tensor]
Axes = Callable[[int], tuple[int, ...]]  # boundary -> its axes as they lie in memory


class Edits:
    """What is done at some sites on the way.

    after: the site at which the pass resumes, which all of them must come after.
    Errors: NotFound; UsageError for an edit that comes before, or two at one place.
    """

    def __init__(
        self, sites: Sites, edits: Mapping[str, Edit], axes: Axes, after: str | None = None
    ) -> None:
        self._sites, self._edits, self._axes, self._after = sites, dict(edits), axes, after
        taken: dict[Depth, str] = {}
        for name in self._edits:
            depth = sites.depth(name)
            if after is not None and depth <= sites.depth(after):
                raise self._too_early(name)
            if depth in taken:
                raise UsageError(
                    f"{sites.who(name)} is the same place as the site '{taken[depth]}'",
                    "replace what is there once",
                )
            taken[depth] = name

    def at_boundary(self, i: int, x: Tensor) -> Tensor:
        """The tensor at boundary i as it goes on."""
        for name, edit in self._edits.items():
            place = self._sites.place(name)
            if place.module is None and place.step == i:
                new = edit(self._sites.read(name, x, len(x))).to(x.dtype)
                x = self._sites.written(name, new)
                x = laid_out(x, self._axes(i)) if x.ndim == 4 else x
        return x

    @contextmanager
    def within(self, i: int) -> Iterator[list[str]]:
        """Edits of the modules within step i, for as long as it runs. Gives the names of those
        that have been made, as they are made."""
        made: list[str] = []
        with ExitStack() as hooks:
            for name, edit in self._edits.items():
                place = self._sites.place(name)
                if place.module is None or place.step != i:
                    continue

                def changed(own: Tensor, name: str = name, edit: Edit = edit) -> Tensor:
                    made.append(name)
                    new = edit(self._sites.read(name, own, len(own))).to(own.dtype)
                    return as_own(own, self._sites.written(name, new))

                who = self._sites.who(name)
                hooks.enter_context(hooked(place.module, place.side, changed, who))
            yield made

    def reach(self, i: int) -> bool:
        """Whether one of them lies within step i, or after it."""
        return any(self._sites.depth(name) > (i, False, 0) for name in self._edits)

    def refuse(self, made: list[str]) -> None:
        """Errors: UsageError where some were made before the pass came to where it resumes."""
        if made:
            raise self._too_early(made[0])

    def _too_early(self, name: str) -> UsageError:
        return UsageError(
            f"{self._sites.who(name)} does not come after the site '{self._after}'",
            "resume at the earlier one, and replace the later one on the way",
        )


def as_own(own: Tensor, x: Tensor) -> Tensor:
    """A new tensor of these values, in memory as the module's own.

    New, for conv blocks add their skip connection in place, onto what a module within returns.
    """
    return torch.empty_like(own).copy_(x)
