"""What a pickle that is read as data may hold: plain values, stubs, and places of bytes.

Values are held to their type (`a`), keys are plain, since hashing a nested tuple may take forever,
and a whole value is `bounded` when written out in full, however often its parts are shared.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

MOST_VALUES = 1_000_000  # of a value written out in full
MOST_DEPTH = 64


class ForeignName(Exception):
    """A pickle names what is not among the few names that are known: it needs code to be read."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        super().__init__(", ".join(self.names[:4]))


class Damaged(ValueError):
    """A file that is damaged, or that says what no library writes."""


class Unsupported(ValueError):
    """A file that may be sound, and holds what is not read here."""


@dataclass(frozen=True, eq=False)
class Span:
    """Bytes of a file, from `start` to `end`, which are read when they are wanted."""

    file: BinaryIO
    start: int
    end: int

    @classmethod
    def of(cls, data: bytes | memoryview) -> Span:
        return cls(io.BytesIO(data), 0, len(data))

    def __len__(self) -> int:
        return self.end - self.start

    def part(self, at: int, n: int) -> Span:
        """n bytes from the place `at` in it. Errors: Damaged where it has fewer."""
        if n > len(self) - at:
            raise Damaged("a pickle that ends too early")
        return Span(self.file, self.start + at, self.start + at + n)

    def read(self) -> bytes:
        """Errors: Damaged where the file is shorter."""
        self.file.seek(self.start)
        if len(data := self.file.read(len(self))) < len(self):
            raise Damaged("a file that ends too early")
        return data


class Stub:
    """Stands for an object of a class that is never imported: attributes and nothing else."""

    def __init__(self, *_: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __setstate__(self, state: Any) -> None:
        for part in state if type(state) is tuple else (state,):  # (attributes, those in slots)
            for name, value in a(dict, part).items() if part is not None else ():
                if a(str, name).startswith("__"):
                    raise Damaged(f"an object with an attribute {name!r:.50}")
                vars(self)[name] = value


def bounded(value: Any) -> None:
    """Errors: Damaged for a value that would be huge or deep when it is written out in full."""
    _written_out(value, {})


def _written_out(value: Any, sizes: dict[int, tuple[int, int]], above: int = 0) -> tuple[int, int]:
    """(values, levels) of a value when shared parts are counted each time. Errors: Damaged."""
    if isinstance(value, str):
        return 1 + len(value) // 8, 0
    if isinstance(value, Stub):
        parts: Collection[Any] = vars(value).values()
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    else:
        return 1, 0
    if not parts:
        return 1, 1
    if id(value) in sizes:
        return sizes[id(value)]
    size, levels = 1, 0
    # A value that holds itself never ends, and so is too deep.
    for part in parts if above < MOST_DEPTH else ():
        more, below = _written_out(part, sizes, above + 1)
        size, levels = size + more, max(levels, below)
        if size > MOST_VALUES:
            break
    if above == MOST_DEPTH or levels == MOST_DEPTH or size > MOST_VALUES:
        raise Damaged(
            f"more than {MOST_VALUES:,} values when written out, or more than {MOST_DEPTH} deep"
        )
    sizes[id(value)] = size, levels + 1
    return sizes[id(value)]


def a(kind: type, value: Any) -> Any:
    """A value of a pickle that has to be of this type. Errors: Damaged."""
    if type(value) is not kind:
        raise Damaged(f"a pickle that takes a {type(value).__name__} for a {kind.__name__}")
    return value


def plain_key(key: Any) -> Any:
    """What a dictionary may have for a key. Errors: Unsupported."""
    if key is not None and type(key) not in (str, int, float, bool):
        raise Unsupported(f"a pickle with a {type(key).__name__} for a key")
    return key
