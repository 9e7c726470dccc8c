"""A site's tensor as tokens [b t d], and back.

    tokens         [b t d]      as it is
    map            [b d h w]    read as h·w tokens, row by row
    channels_last  [b h w d]    the same
    pooled         [b d]        read as one token

Shapes are checked against the entry on every batch: a wrong hook gives plausible, wrong numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.errors import Mismatch
from saebench.specs import SiteSpec


def to_tokens(x: Tensor, site: SiteSpec, n_images: int, who: str) -> Tensor:
    """A site's tensor as [b t d]: a view. Errors: Mismatch naming both shapes."""
    wanted = native_shape(site, n_images)
    if tuple(x.shape) != wanted:
        raise Mismatch(
            f"{who}: here is {list(x.shape)}, and the entry says {list(wanted)} "
            f"({_axes(site)}, for {n_images} images)",
            _diagnosis(tuple(x.shape), wanted, site),
        )
    if site.layout == "map":
        return x.flatten(2).transpose(1, 2)
    if site.layout == "channels_last":
        return x.flatten(1, 2)
    return x.unsqueeze(1) if site.layout == "pooled" else x


def from_tokens(acts_btd: Tensor, site: SiteSpec, who: str) -> Tensor:
    """[b t d] in the site's own shape: a view. Errors: Mismatch naming both shapes."""
    wanted = (site.tokens, site.width)
    if acts_btd.ndim != 3 or tuple(acts_btd.shape[1:]) != wanted:
        raise Mismatch(
            f"{who}: the given activations are {list(acts_btd.shape)}, "
            f"and the site has [b, {site.tokens}, {site.width}]",
            "give all tokens of the site, in its own order: [images, tokens, width]",
        )
    if site.layout == "map":
        assert site.grid is not None
        return acts_btd.transpose(1, 2).unflatten(2, site.grid)
    if site.layout == "channels_last":
        assert site.grid is not None
        return acts_btd.unflatten(1, site.grid)
    return acts_btd[:, 0] if site.layout == "pooled" else acts_btd


def axes_in_memory(x: Tensor) -> tuple[int, ...]:
    """The axes of a tensor as they lie in memory, the outermost first."""
    return tuple(sorted(range(x.ndim), key=lambda axis: -x.stride(axis)))


def laid_out(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A tensor with its axes in memory in the given order: copied only where they are in another.

    A convolution whose channels lie side by side rounds otherwise than one over whole planes. So a
    pass resumes bit for bit only from a map that lies in memory as the model's own does.
    """
    strides, length = [0] * x.ndim, 1
    for axis in reversed(axes):
        strides[axis] = length
        length *= x.shape[axis]
    if x.stride() == tuple(strides):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def native_shape(site: SiteSpec, n_images: int) -> tuple[int, ...]:
    """The shape of the module's own tensor at a site, for so many images."""
    if site.layout == "map":
        assert site.grid is not None
        return (n_images, site.width, *site.grid)
    if site.layout == "channels_last":
        assert site.grid is not None
        return (n_images, *site.grid, site.width)
    if site.layout == "pooled":
        return (n_images, site.width)
    return (n_images, site.tokens, site.width)


def _axes(site: SiteSpec) -> str:
    if site.layout == "map":
        return "a map of images, channels, height, width"
    if site.layout == "channels_last":
        return "a map of images, height, width, channels"
    if site.layout == "pooled":
        return "pooled: images, width"
    parts = [f"{part.stop - part.start} {kind}" for kind, part in site.kinds.items()]
    return f"images, tokens ({' + '.join(parts)}), width"


def _diagnosis(shape: tuple[int, ...], wanted: tuple[int, ...], site: SiteSpec) -> str:
    """What a wrong shape most probably is."""
    if shape == wanted[1:]:
        return "the batch axis is gone: the module returns a tuple or drops it"
    if len(shape) == 3 == len(wanted) and shape == (wanted[1], wanted[0], wanted[2]):
        return "the axes are [tokens, images, width]: build the model batch first"
    if len(shape) == 4 and (len(wanted) != 4 or _channels(shape, site.layout) != site.width):
        return _map_diagnosis(shape, site)
    if len(shape) == 3 and len(wanted) != 3:
        return f'these are {shape[1]} tokens: layout = "tokens", width = {shape[2]}'
    if len(shape) == 2:
        return f'this is one vector an image: layout = "pooled", width = {shape[1]}'
    if shape[0] != wanted[0]:
        return f"the first axis is not the {wanted[0]} images"
    if len(shape) == 3 and shape[1] != wanted[1]:
        return f"the model has {shape[1]} tokens here: correct cls, registers, … and grid"
    if shape[-1] != site.width and len(shape) == 3:
        return f"the model has width {shape[-1]} here: correct width"
    grid = shape[2:] if site.layout == "map" else shape[1:3]
    return f"the model's grid is {list(grid)} here: correct grid"


def _channels(shape: tuple[int, ...], layout: str) -> int:
    return shape[3] if layout == "channels_last" else shape[1]


def _map_diagnosis(shape: tuple[int, ...], site: SiteSpec) -> str:
    """A map where the entry says none, or whose channels are another axis, or more or fewer."""
    layouts = ("map", "channels_last")
    fitting = [layout for layout in layouts if _channels(shape, layout) == site.width]
    layout = (*fitting, site.layout if site.layout in layouts else "map")[0]
    width = _channels(shape, layout)
    if layout == site.layout:
        return f"the model has width {width} here: correct width"
    grid = list(shape[1:3] if layout == "channels_last" else shape[2:])
    return f'this is a map: layout = "{layout}", width = {width}, grid = {grid}'
