"""Reads YAML configurations: no key twice, no merging, no more than is written out.

YAML lets a text refer to its own parts, so that a few lines stand for gigabytes.
"""

from __future__ import annotations

from typing import Any

import yaml

from saebench.plainvalues import bounded


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) != len(keys) or "<<" in keys:
            raise yaml.constructor.ConstructorError(
                None, None, "a key that is there twice, or stands for others", node.start_mark
            )
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> None:
        """Merging keys is refused above."""


def parse_yaml(text: bytes) -> Any:
    """The value of a YAML text. Errors: ValueError, RecursionError."""
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else "damaged") from None
    bounded(value)
    return value
