"""The sites of an entry in the model: where each lies, what comes before what, and its tokens.

A forward pass meets a boundary before the modules of the step that follows it, and the modules of a
step in the order in which they are declared: the input of one when it is entered, its output when
all within it is through.
"""

from __future__ import annotations

from difflib import get_close_matches

from torch import Tensor, nn

from saebench.backbones.sites import from_tokens, to_tokens
from saebench.backbones.steps import Place, SteppedModel, place_of
from saebench.errors import NotFound
from saebench.specs import BackboneSpec

Depth = tuple[int, bool, int]  # step, whether within it, and there when


class Sites:
    """Name of a site -> its place, and its tensor as tokens. All raise NotFound for other names."""

    def __init__(self, spec: BackboneSpec, model: SteppedModel) -> None:
        """Errors: SpecError where the model has no such module, or does not run it."""
        self._spec = spec
        self._places = {
            name: place_of(model, site.path, site.side, self.who(name))
            for name, site in spec.sites.items()
        }
        times = _times(model.module)
        self._depths: dict[str, Depth] = {}
        for name, place in self._places.items():
            site = spec.sites[name]
            inside = place.module is not None
            self._depths[name] = (place.step, inside, times[site.path, site.side] if inside else 0)

    def place(self, name: str) -> Place:
        if name in self._places:
            return self._places[name]
        near = get_close_matches(name, self._places, n=3, cutoff=0.3) or list(self._places)
        raise NotFound(
            f"the backbone '{self._spec.name}' has no site '{name}'",
            f"the nearest: {', '.join(near)}" if near else "its entry declares no sites",
        )

    def depth(self, name: str) -> Depth:
        """Sites of a greater depth come later. Of two in one block it is as they are declared."""
        self.place(name)
        return self._depths[name]

    def who(self, name: str) -> str:
        """A site as errors name it."""
        site = self._spec.sites[name]
        return f"{self._spec.name}, site '{name}' (the {site.side} of '{site.path}')"

    def read(self, name: str, x: Tensor, n_images: int) -> Tensor:
        """The model's own tensor as [b t d]: a view. Errors: Mismatch."""
        return to_tokens(x, self._spec.sites[name], n_images, self.who(name))

    def written(self, name: str, acts_btd: Tensor) -> Tensor:
        """[b t d] in the model's own shape: a view. Errors: Mismatch."""
        return from_tokens(acts_btd, self._spec.sites[name], self.who(name))


def _times(module: nn.Module) -> dict[tuple[str, str], int]:
    """(path, side) -> when a pass comes there, were modules run in the order of declaration."""
    order: list[tuple[str, str]] = []

    def walk(module: nn.Module, path: str) -> None:
        order.append((path, "input"))
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)
        order.append((path, "output"))

    walk(module, "")
    return {where: time for time, where in enumerate(order)}
