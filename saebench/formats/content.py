"""One weights file and the configurations beside it, for formats to recognise and read.

The file's name proves nothing: what it is follows from its first bytes, then from its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from saebench.beside import usual
from saebench.errors import WeightsError
from saebench.formats import containers, pickles
from saebench.formats.containers import META, Container


@dataclass(frozen=True)
class Content:
    """One weights file. `header` is saev's line of JSON or the header of safetensors.

    `beside`: the files that belong to it, by the name a format knows them by. All that is read is
    read once, when it is first asked for.
    """

    path: Path
    container: Container
    beside: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The free text fields of a safetensors header; empty for other containers."""
        return self.header.get(META, {}) if self.container == "safetensors" else {}

    @cached_property
    def header(self) -> dict[str, Any]:
        """saev's line of JSON, or the header of safetensors; empty for other containers."""
        if self.container == "safetensors":
            return containers.read_header(self.path)
        return self._saev[0] if self.container == "saev" else {}

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of its tensors, or the top-level keys of what was pickled."""
        if self.container == "safetensors":
            return frozenset(name for name in self.header if name != META)
        return frozenset(self.objects)

    def has(self, *names: str) -> bool:
        """Whether all these are there, at the top level."""
        return self.names.issuperset(names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a top-level tensor; () for what is none, or is not there."""
        if self.container == "safetensors":
            return tuple(self.header.get(name, {}).get("shape", ()))
        value = self.objects.get(name)
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def rank(self, name: str) -> int:
        """The number of dimensions of a top-level tensor; -1 where there is none."""
        if self.container == "safetensors":
            return len(self.shape(name)) if name in self.names else -1
        value = self.objects.get(name)
        return value.ndim if isinstance(value, Tensor) else -1

    @cached_property
    def objects(self) -> Mapping[str, Any]:
        """What it holds, by its top-level names: tensors, and for pickles whatever else.

        Tensors are in the file's own dtype, on the CPU. Errors: WeightsError.
        """
        readers = {
            "safetensors": containers.read_safetensors,
            "torch": containers.read_torch,
            "npz": containers.read_npz,
            "pickle": containers.read_pickle,
        }
        value = self._saev[1] if self.container == "saev" else readers[self.container](self.path)
        return containers.as_mapping(value, self.path)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Those of the top-level objects that are tensors."""
        return {name: value for name, value in self.objects.items() if isinstance(value, Tensor)}

    def nested(self, name: str) -> Mapping[str, Any]:
        """A mapping inside the file, such as `model_state_dict`; {} where there is none."""
        if self.container == "safetensors":
            return {}
        value = self.objects.get(name)
        if isinstance(value, pickles.Stub):
            return pickles.plain(value)
        named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        return value if named else {}  # type: ignore[return-value]

    def config(self, *names: str) -> tuple[str, dict[str, Any]]:
        """The first of these files that lies beside it, and what it says; ('', {}) for none.

        Errors: WeightsError for one that cannot be read.
        """
        for name in names:
            if name in self.beside:
                return name, self._configs(name)
        return "", {}

    def _configs(self, name: str) -> dict[str, Any]:
        if name not in self._read:
            self._read[name] = containers.read_config(self.beside[name])
        return self._read[name]

    @cached_property
    def _read(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def _saev(self) -> tuple[dict[str, Any], Any]:
        return containers.read_saev(self.path)


def sniff(path: Path, beside: Mapping[str, Path] | None = None) -> Content:
    """The content of a file; `beside` None: the configurations that lie where they usually do.

    Errors: WeightsError for everything that holds no weights.
    """
    container = containers.container_of(path)
    content = Content(path, container, usual(path) if beside is None else beside)
    if container == "safetensors":
        _ = content.header  # what is cut is told at once
    return content


def refuse_unknown(names: frozenset[str] | set[str], known: set[str], what: str) -> None:
    """Errors: WeightsError for names in a file that a format does not know: none is ignored."""
    if strange := names - known:
        raise WeightsError(
            f"{what} has no place for: {', '.join(sorted(strange)[:8])}",
            "what they mean is not known, so it is not guessed; is it another format?",
        )
