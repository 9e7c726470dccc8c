"""Reads, and replaces, what a module within a step is given or returns, through forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from saebench.errors import Mismatch, SpecError

Side = Literal["input", "output"]


@contextmanager
def hooked(
    module: nn.Module, side: Side, change: Callable[[Tensor], Tensor | None], who: str
) -> Iterator[None]:
    """Call `change` with the tensor at a side of a module; if it returns one, that replaces it.

    Errors: Mismatch where there is not exactly one tensor; SpecError where the module does not run
    exactly once. torch's fused attention, for one, never calls `out_proj`.
    """
    calls = 0

    def visit(seen: Any, values: Any) -> Any:
        nonlocal calls
        calls += 1
        tensor = only_tensor(seen, who)
        new = change(tensor)
        return None if new is None else _replaced(values, tensor, new)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = (*args, *kwargs.values())
        # What goes by keyword beside a positional tensor is not the site: a mask, a rotary table.
        positional = any(isinstance(value, Tensor) for value in args)
        new = visit(args if positional else given, given)
        if new is None:
            return None
        return new[: len(args)], dict(zip(kwargs, new[len(args) :], strict=True))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return visit(output, output)

    if side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise SpecError(
            f"{who}: the module runs {calls} times in a forward pass, so this is not one site",
            "take the module around it, or one within it",
        )


def only_tensor(values: Any, who: str) -> Tensor:
    """The one tensor of a hook's values, which may stand alone or in a tuple, even repeatedly.

    Attention returns (output, None); it is given the same tensor as query, key and value.
    """
    if isinstance(values, Tensor):
        return values
    if isinstance(values, (tuple, list)):
        tensors = {id(value): value for value in values if isinstance(value, Tensor)}
        if len(tensors) == 1:
            return next(iter(tensors.values()))
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors.values())
        what = f"a tuple of {len(tensors)} different tensors: {shapes or 'none'}"
    else:
        what = f"a {type(values).__name__}"
    raise Mismatch(
        f"{who}: a site is one tensor, and here is {what}",
        "choose a module, or a side, that passes one tensor",
    )


def _replaced(values: Any, old: Tensor, new: Tensor) -> Any:
    if isinstance(values, Tensor):
        return new
    replaced = [new if value is old else value for value in values]
    return tuple(replaced) if isinstance(values, tuple) else replaced
