"""What the forward passes of several families are put together from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from saebench.backbones.steps import Step, SteppedModel


def runs_as(model: nn.Module, known: type[nn.Module], *methods: str) -> bool:
    """Whether a model is of a known class, or of a subclass that leaves its forward pass alone.

    A subclass that overrides one of the methods that the steps repeat is another forward pass: it
    is refused rather than run as if it were this one.
    """
    kind: Any = type(model)
    return isinstance(model, known) and all(
        getattr(kind, method) is getattr(known, method) for method in methods
    )


def one(model: nn.Module, path: str) -> Step:
    """A step that is one module."""
    return Step(model.get_submodule(path), modules=(path,), starts=(path,), ends=(path,))


def each(model: nn.Module, path: str) -> tuple[Step, ...]:
    """The children of an `nn.Sequential`, one step each."""
    children = model.get_submodule(path).named_children()
    return within(path, (one(model, f"{path}.{name}") for name, _ in children))


def within(path: str, steps: Iterable[Step]) -> tuple[Step, ...]:
    """Steps that make up one module, whose input is the first's and whose output is the last's."""
    first, *rest = steps
    first = replace(first, starts=(*first.starts, path))
    if not rest:
        return (replace(first, ends=(*first.ends, path)),)
    *rest, last = rest
    return (first, *rest, replace(last, ends=(*last.ends, path)))


def below(prefix: str, model: SteppedModel, *, module: nn.Module) -> SteppedModel:
    """The same forward pass, of a model that is the submodule `prefix` of `module`."""

    def lower(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{prefix}.{path}" for path in paths)

    steps = tuple(
        replace(
            step,
            modules=lower(step.modules),
            starts=lower(step.starts),
            ends=lower(step.ends),
        )
        for step in model.steps
    )
    natural = {name: f"{prefix}.{path}" for name, path in model.natural.items()}
    return replace(model, module=module, steps=steps, reads=lower(model.reads), natural=natural)


def pair(value: Any) -> tuple[int, int]:
    """[h w], as the libraries keep it."""
    return (int(value[0]), int(value[1]))
