"""A vision model as a sequence of steps, so that a forward pass can stop, and resume, at a site.

    images_b3hw -> step 0 -> step 1 -> … -> step n-1 -> read -> Output

A step takes one tensor and returns one. Between two steps lies a boundary, and the tensor there is
all that later layers see: a *bottleneck* site is a boundary (the residual stream after a block, a
conv stage, the pooled embedding). A site on a module that runs within a step is a *branch* (an MLP,
an attention): a skip connection passes it by, so resuming there needs the boundary before the step.

`architectures` has one file per family; `timm_models` and `open_clip_models` say who knows what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from saebench.errors import SpecError


@dataclass(frozen=True)
class Output:
    """What the backbone's head reads, and what it says.

    embedding_bd: timm: the input of the classifier, `forward_head(x, pre_logits=True)`. CLIP: the
    projected image embedding, not normalised. logits_bc: None where there is no classifier.
    features_bd: what a linear head reads, where that is not the embedding (`HeadSpec.features`).
    """

    embedding_bd: Tensor
    logits_bc: Tensor | None = None
    features_bd: Tensor | None = None

    @property
    def read_bd(self) -> Tensor:
        """What a linear head reads."""
        return self.embedding_bd if self.features_bd is None else self.features_bd


@dataclass(frozen=True)
class Step:
    """One step of the forward pass.

    modules: paths of the modules that it calls; whatever lies below them runs within this step.
    starts: modules whose input is the step's input; ends: modules whose output is its output.
    short: of the last block of a model whose head reads CLS alone, the row of the CLS token only:
    [b t d] -> [b 1 d]. None: there is no shorter way.
    """

    run: Callable[[Tensor], Tensor]
    modules: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    short: Callable[[Tensor], Tensor] | None = None


class TextTower(Protocol):
    """The text half of a contrastive model."""

    logit_scale: float
    logit_bias: float

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm float32 embeddings [n d] of n texts."""
        ...


@dataclass(frozen=True)
class SteppedModel:
    """A module together with its forward pass as steps. A user's own loader may return one.

    module: the whole model; a site's path is one of its `named_modules()`.
    read: the last boundary -> Output; reads: modules whose input is that boundary.
    tower: the part that sees images, where the activation function is checked (None: `module`);
    text_tower: the part that sees texts, where it is checked too (None: nothing is).
    prefix: tokens before the patches, by kind, and grid: patches [h w], where the model has tokens.
    image_size: [h w] of the images it takes, where it takes only one; else `multiple`: of how many
    pixels each side has to be a multiple.
    sequence: the boundary where the final, normed sequence of tokens [b t d] lies, the prefix and
    then the patches, where the model has one.
    natural: the sites that an entry would name, as name -> path of the module whose output it is.
    """

    module: nn.Module
    steps: tuple[Step, ...]
    read: Callable[[Tensor], Output]
    reads: tuple[str, ...] = ()
    tower: nn.Module | None = None
    n_classes: int = 0
    prefix: Mapping[str, int] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    image_size: tuple[int, int] | None = None
    multiple: int = 1
    text: TextTower | None = None
    text_tower: nn.Module | None = None
    natural: Mapping[str, str] = field(default_factory=dict)
    sequence: int | None = None

    def boundaries(self) -> dict[tuple[str, str], int]:
        """(module path, side) -> i, for all that lies on a boundary: the input of step i."""
        found: dict[tuple[str, str], int] = {}
        for i, step in enumerate(self.steps):
            found.update({(path, "input"): i for path in step.starts})
            found.update({(path, "output"): i + 1 for path in step.ends})
        found.update({(path, "input"): len(self.steps) for path in self.reads})
        return found


@dataclass(frozen=True)
class Place:
    """Where a site lies: before step `step`, or at a side of a `module` that runs within it."""

    step: int
    module: nn.Module | None = None
    side: Literal["input", "output"] = "output"


def boundaries(model: SteppedModel, x: Tensor) -> Iterator[Tensor]:
    """The tensor at each boundary, the images themselves first."""
    yield x
    for step in model.steps:
        x = step.run(x)
        yield x


def place_of(model: SteppedModel, path: str, side: Literal["input", "output"], who: str) -> Place:
    """Find a module path and side among the steps.

    Errors: SpecError where the model has no such module, or does not run it on its way from images
    to its embedding; it names the nearest that would do.
    """
    modules = dict(model.module.named_modules())
    if path not in modules:
        raise SpecError(f"{who}: the model has no module '{path}'", _nearest(path, modules))
    on_boundary = model.boundaries()
    if (path, side) in on_boundary:
        return Place(on_boundary[path, side])
    for i, step in enumerate(model.steps):
        if any(path == top or path.startswith(f"{top}.") for top in step.modules):
            return Place(i, modules[path], side)
    sites = [f"{known} ({at})" for known, at in on_boundary]
    raise SpecError(
        f"{who}: the {side} of '{path}' is not on the way from the images to the embedding",
        _nearest(f"{path} ({side})", sites),
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    known = [path for path in known if path]
    near = get_close_matches(name, known, n=3, cutoff=0.3)
    return "the nearest: " + ", ".join(near or known[:3])


def memory_format(module: nn.Module) -> torch.memory_format:
    """The memory format of a model's conv maps, which is that of its conv weights."""
    for weight in module.parameters():
        if weight.ndim == 4 and weight.is_contiguous():
            return torch.contiguous_format
        if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
    return torch.contiguous_format
