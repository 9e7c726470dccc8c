"""Waves: coders that are held in memory together, packed so that they stay within --memory.

What a coder takes is told from above, before anything is loaded: twice the bytes of its weights.
Probes are not in it: they are fitted one after the other, and then read from their files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from saebench.coders import CoderRef, chain_of
from saebench.errors import UsageError
from saebench.probe_options import LONG, n_train_of
from saebench.registry import Registry
from saebench.specs import BackboneSpec
from saebench.units import Unit
from saebench.weights import weights_bytes


@dataclass(frozen=True)
class Wave:
    """Coders that are held in memory together, with all their units: one pass over the images."""

    coders: tuple[CoderRef, ...]
    units: tuple[Unit, ...]
    n_bytes: int


def memory_bytes(text: str) -> int:
    """'4GiB', '500MB', '2g' -> bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not found or float(found[1]) <= 0:
        raise UsageError(f"--memory {text}: not a size", "write it as  4GiB  or  500MB")
    base = 1024 if found[3] or not text.lower().rstrip().endswith("b") else 1000
    return int(float(found[1]) * base ** " kmgt".index(found[2] or " "))


def waves_of(registry: Registry, units: Sequence[Unit], memory: int) -> Iterator[Wave]:
    """The waves of a group. Units that take a long pass over train images come last.

    So all else is finished and kept by then.
    """
    for long in (False, True):
        yield from _pack(registry, [u for u in units if (n_train_of(u) > LONG) == long], memory)


def _pack(registry: Registry, units: Sequence[Unit], memory: int) -> Iterator[Wave]:
    """First fit in order: a coder joins the wave while their sum stays within `memory`.

    A derived control stands behind the SAE it is made from, so that they mostly share a wave.
    """
    by_coder: dict[CoderRef, list[Unit]] = {}
    for unit in units:
        by_coder.setdefault(unit.coder, []).append(unit)
    wave: list[CoderRef] = []
    held = 0

    def close() -> Wave:
        return Wave(tuple(wave), tuple(u for c in wave for u in by_coder[c]), held)

    for coder in by_coder:
        size = _bytes(registry, coder, by_coder[coder][0].backbone)
        if wave and held + size > memory:
            yield close()
            wave, held = [], 0
        wave.append(coder)
        held += size
    if wave:
        yield close()


def _bytes(registry: Registry, coder: CoderRef, backbone: BackboneSpec) -> int:
    """Memory that a coder takes, from above: a file may hold float16, and computing is float32.

    An SAE on an SAE holds those below it too, and a set all its members.
    """
    if coder.members:
        return sum(_bytes(registry, member, backbone) for member in coder.members)
    if coder.control in ("identity", "zero", "mean"):
        return 0
    if coder.control == "pca":
        return backbone.sites[coder.site].width * (coder.k or 0) * 4
    assert coder.sae is not None
    return 2 * sum(weights_bytes(link) for link in chain_of(registry, coder.sae))
