"""Reads pickles as data: an interpreter of the operations that build plain values, and no others.

A pickle is a program for a small machine, which Python's own lets call anything. This one knows no
function but those that its caller names: whatever else a file names is refused before anything is
built of it. Operations of protocols before 2, and of extensions, do not exist here.

What a hostile pickle can still do is be large. So steps are counted, lengths are held against the
bytes that are there, keys are plain (hashing a nested tuple may take forever), and what comes out
is bounded when written out in full, however often its parts are shared.

A pickle may hold gigabytes of weights. It is read from its file as it is run, and bytes inside it
are a `Span`: where they are, for whoever wants them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from saebench.plainvalues import (
    Damaged,
    ForeignName,
    Span,
    Stub,
    Unsupported,
    a,
    bounded,
    plain_key,
)

MOST_STEPS = 500_000  # a tensor takes some forty, a list in a configuration one an item
MOST_SHARED = 100_000  # of what is handed to functions, beside what the file is long


Names = Callable[[str], Any]
"""What a pickle means by "module.name": `Stub`, what is called in its place, or a plain value.

Errors: LookupError for a name that is not known.
"""


def loads(
    data: Span,
    names: Names,
    stored: Callable[[Any], Any] | None = None,
    at: int = 0,
) -> tuple[Any, int]:
    """The value of the pickle at a place in `data`, and the place where it ends.

    `stored` gives what a reference to something outside the pickle stands for.
    Errors: ForeignName, Damaged, Unsupported.
    """
    machine = _Machine(data, names, stored, at)
    try:
        value = machine.run()
        bounded(value)
    except (LookupError, TypeError, ValueError, OverflowError, struct.error) as error:
        if machine.foreign:
            raise ForeignName(machine.foreign) from None
        if isinstance(error, (Damaged, Unsupported)):
            raise
        raise Damaged(f"a damaged pickle ({type(error).__name__}: {error})") from None
    if machine.foreign:
        raise ForeignName(machine.foreign)
    return value, machine.at


_MARK = object()
_NEW: Mapping[int, Callable[[], Any]] = {
    ord("N"): lambda: None,
    0x88: lambda: True,
    0x89: lambda: False,
    ord(")"): tuple,
    ord("]"): list,
    ord("}"): dict,
    0x8F: set,
}
_NUMBERS = {
    ord("J"): struct.Struct("<i"),
    ord("K"): struct.Struct("<B"),
    ord("M"): struct.Struct("<H"),
    ord("G"): struct.Struct(">d"),
}
# Operations with a length of so many bytes, and then so many bytes.
_TEXTS = {0x8C: 1, ord("X"): 4, 0x8D: 8, ord("U"): 1}
_BYTES = {ord("C"): 1, ord("B"): 4, 0x8E: 8}
_LONG = 0x8A
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_GETS = {ord("h"): 1, ord("j"): 4}
_PUTS = {ord("q"): 1, ord("r"): 4}
_SIZED = (str, Span, list, tuple, dict, set)
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocol 2 writes them


class _Machine:
    def __init__(
        self, data: Span, names: Names, stored: Callable[[Any], Any] | None, at: int
    ) -> None:
        self.data, self.names, self.stored, self.at = data, names, stored, at
        self.file, self.end = data.file, len(data)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.granted: dict[int, Any] = {}  # by identity
        self.foreign: list[str] = []
        self.given = 0

    def run(self) -> Any:
        for _ in range(MOST_STEPS):
            operation = self.take(1)[0]
            if operation == ord("."):
                return self.stack.pop()
            self.do(operation)
        raise Unsupported(f"a pickle of more than {MOST_STEPS:,} steps")

    def span(self, n: int) -> Span:
        """Where the next n bytes are."""
        part = self.data.part(self.at, n)
        self.at += n
        return part

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        if n > self.end - self.at:
            raise Damaged("a pickle that ends too early")
        self.file.seek(self.data.start + self.at)
        self.at += n
        if len(taken := self.file.read(n)) < n:
            raise Damaged("a file that ends too early")
        return taken

    def length(self, n: int) -> int:
        return int.from_bytes(self.take(n), "little")

    def line(self) -> str:
        rest = len(self.data) - self.at
        end = self.data.part(self.at, min(rest, 1000)).read().find(b"\n")
        if end < 0:
            raise Damaged("a pickle that ends too early")
        return str(self.take(end + 1)[:-1], "utf-8")

    def since_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise Damaged("a pickle without a mark where one is needed")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def do(self, op: int) -> None:
        stack = self.stack
        if op in _NEW:
            stack.append(_NEW[op]())
        elif op in _TEXTS:
            stack.append(str(self.take(self.length(_TEXTS[op])), "utf-8"))
        elif op in _GETS:
            stack.append(self.memo[self.length(_GETS[op])])
        elif op in _PUTS:
            self.memo[self.length(_PUTS[op])] = stack[-1]
        elif op == 0x94:  # MEMOIZE
            self.memo[len(self.memo)] = stack[-1]
        elif op in _NUMBERS:
            stack.extend(_NUMBERS[op].unpack(self.take(_NUMBERS[op].size)))
        elif op == _LONG:
            stack.append(int.from_bytes(self.take(self.length(1)), "little", signed=True))
        elif op in _BYTES:
            stack.append(self.span(self.length(_BYTES[op])))
        elif op == ord("("):
            stack.append(_MARK)
        elif op in _TUPLES:
            items = stack[-_TUPLES[op] :]
            del stack[-_TUPLES[op] :]
            stack.append(tuple(items))
        elif op == ord("t"):
            stack.append(tuple(self.since_mark()))
        elif op in (ord("a"), ord("e")):
            items = [stack.pop()] if op == ord("a") else self.since_mark()
            a(list, stack[-1]).extend(items)
        elif op in (ord("s"), ord("u")):
            if op == ord("s"):
                stack[-2:-2] = [_MARK]
            items = self.since_mark()
            keys = [plain_key(key) for key in items[::2]]
            a(dict, stack[-1]).update(zip(keys, items[1::2], strict=True))
        elif op == 0x90:  # ADDITEMS, of a set
            items = self.since_mark()
            a(set, stack[-1]).update(map(plain_key, items))
        elif op == ord("c"):
            stack.append(self.named(self.line(), self.line()))
        elif op == 0x93:  # STACK_GLOBAL
            name, module = stack.pop(), stack.pop()
            stack.append(self.named(a(str, module), a(str, name)))
        elif op == ord("R"):
            arguments = a(tuple, stack.pop())
            stack.append(self.called(stack.pop(), arguments))
        elif op == 0x81:  # NEWOBJ: an object without its attributes
            stack.pop()
            stack.append(self.called(stack.pop(), ()))
        elif op == ord("b"):
            state = stack.pop()
            self.build(stack[-1], state)
        elif op == ord("Q"):
            if self.stored is None:
                raise Damaged("a pickle that refers to something outside itself")
            stack.append(self.stored(stack.pop()))
        elif op == 0x80:  # PROTO
            self.take(1)
        elif op == 0x95:  # FRAME
            self.take(8)
        else:
            raise Unsupported(f"a pickle with the operation {op:#04x}, which weights do not need")

    def named(self, module: str, name: str) -> Any:
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        try:
            found = self.names(full)
        except LookupError:
            # The rest is read with a stub in its place, so that all such names can be told.
            self.foreign.append(
                full if full.isprintable() and len(full) < 200 else repr(full[:200])
            )
            found = Stub
        self.granted[id(found)] = found
        return found

    def called(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Only what was named can be called: a value that a pickle built never is."""
        if not self.knows(function):
            raise Damaged(f"a pickle that calls a {type(function).__name__}")
        self.give(arguments)
        return function(*arguments)

    def build(self, value: Any, state: Any) -> None:
        """Give an object its state. That of a dictionary (`_metadata`) decides nothing."""
        if type(value) is not dict:
            if not (self.knows(type(value)) and hasattr(value, "__setstate__")):
                raise Damaged(f"a pickle that gives a {type(value).__name__} a state")
            self.give(state if type(state) is tuple else (state,))
            value.__setstate__(state)

    def give(self, arguments: tuple[Any, ...]) -> None:
        """Count what is handed to functions, which may copy it, often for a step or two each."""
        self.given += sum(len(one) for one in arguments if isinstance(one, _SIZED))
        if self.given > len(self.data) + MOST_SHARED:
            raise Damaged("a pickle that does one thing again and again")

    def knows(self, value: Any) -> bool:
        """Whether it is something that was named, and not a value that was built."""
        return id(value) in self.granted
