"""A backbone made by a user's own function: `loader = "package.module:function"`.

The function is called with the BackboneSpec and returns one of
    Backbone       used as it is
    SteppedModel   any module, with its forward pass as steps
    nn.Module      of timm or open_clip, whose steps are known here
It is the only code that runs, and only an entry that names it runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from saebench.errors import SpecError
from saebench.specs import BackboneSpec


def user_function(spec: BackboneSpec) -> Callable[[BackboneSpec], Any]:
    """Import the function that an entry names. Errors: SpecError where there is none."""
    where = f"{spec.path or spec.name}: loader = '{spec.loader}'"
    module_name, _, function_name = spec.loader.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        # An import that fails within the user's module is theirs to see, with its traceback.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise SpecError(
            f"{where}: there is no module '{error.name}'",
            "install the package, or put its folder on PYTHONPATH",
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value)]
        near = get_close_matches(function_name, known, n=3, cutoff=0.4)
        raise SpecError(
            f"{where}: {module_name} has no function '{function_name}'",
            f"the nearest: {', '.join(near)}" if near else "",
        )
    return function
