"""What a model says of itself: its natural sites, as an entry would write them down.

One forward pass over blank images shows the shapes at a model's boundaries; the layout of the
tokens is the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from saebench.backbones.steps import SteppedModel, boundaries
from saebench.errors import SpecError
from saebench.specs import SiteSpec


def site_specs(model: SteppedModel, size: int | None = None) -> dict[str, SiteSpec]:
    """The natural sites of a model, by name: residual stream, stages, final norm, embedding.

    size: of the square images it is used at, in pixels; none: the one size that it takes.
    Errors: SpecError where the size has to be given, or the model does not say what its tokens are.
    """
    if size is None:
        if model.image_size is None:
            raise SpecError("the model takes images of any size", "say which size it is used at")
        size = model.image_size[0]
    shapes = _boundary_shapes(model, size)
    at = model.boundaries()
    return {
        name: _site(path, shapes[at[path, "output"]], model) for name, path in model.natural.items()
    }


def _boundary_shapes(model: SteppedModel, size: int) -> list[tuple[int, ...]]:
    """The shape, for one image, at each boundary: [3 h w] first."""
    parameter = next(model.module.parameters())
    blank = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    training = model.module.training
    model.module.eval()
    try:
        with torch.inference_mode():
            return [tuple(x.shape[1:]) for x in boundaries(model, blank)]
    finally:
        model.module.train(training)


def _site(path: str, shape: tuple[int, ...], model: SteppedModel) -> SiteSpec:
    if len(shape) == 1:
        return SiteSpec(path=path, layout="pooled", width=shape[0])
    if len(shape) == 3:
        return SiteSpec(path=path, layout="map", width=shape[0], grid=(shape[1], shape[2]))
    n_prefix, grid = sum(model.prefix.values()), model.grid
    n_patches = 0 if grid is None else grid[0] * grid[1]
    if shape[0] not in (n_patches, n_prefix + n_patches):
        raise SpecError(
            f"'{path}' has {shape[0]} tokens, and the model says it has {dict(model.prefix)} "
            f"and a grid of {grid}",
            "correct prefix and grid in its SteppedModel",
        )
    prefix: Mapping[str, int] = model.prefix if shape[0] > n_patches else {}
    return SiteSpec(
        path=path,
        width=shape[1],
        cls=prefix.get("cls", 0),
        distillation=prefix.get("distillation", 0),
        registers=prefix.get("registers", 0),
        grid=grid,
    )
