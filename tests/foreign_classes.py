"""Objects of classes that are not here, as other projects pickle them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def foreign(path: str, attributes: Mapping[str, Any]) -> Iterator[object]:
    """An object of the class `path`, whose modules are there only until what it is in is written.

    What reads it then has no such class.
    """
    module, _, name = path.rpartition(".")
    parts = module.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    if known := [one for one in names if one in sys.modules]:
        raise AssertionError(f"{', '.join(known)} would be replaced")
    sys.modules.update({one: ModuleType(one) for one in names})
    try:
        made = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, made)
        one = made()
        vars(one).update(attributes)
        yield one
    finally:
        for each in names:
            del sys.modules[each]
