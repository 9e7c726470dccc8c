"""Where entries and task files are found, by name, glob and origin.

Search path, first wins: `--registry PATH` > `SAEBENCH_PATH` > the user's configuration folder >
entry points (`saebench.content`) > built in. Each is a content folder: `registry/backbones`,
`registry/datasets`, `registry/saes`, `tasks`, `leaderboards` (a bare registry folder, with
`backbones/` directly in it, serves too). The built-in content is found by exactly this path.

An entry's name is its file's path below its folder without `.toml`: `saes/tiny-vit/topk-k16.toml`
is the SAE `tiny-vit/topk-k16`. Only names are listed until an entry is asked for.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

from saebench import paths
from saebench.errors import NotFound, SpecError, UsageError
from saebench.specs import BackboneSpec, BoardSpec, DatasetSpec, SaeSpec
from saebench.strict import Spec, read_spec

_GLOB = set("*?[")


def is_glob(pattern: str) -> bool:
    """Whether a name holds a wildcard."""
    return not _GLOB.isdisjoint(pattern)


@dataclass(frozen=True)
class Origin:
    """One folder of content. `trusted`: its Python files may run."""

    label: str
    root: Path
    trusted: bool

    def require_trust(self, what: str) -> None:
        """Errors: UsageError where Python from here may not run."""
        if not self.trusted:
            raise UsageError(
                f"{what} would run code from a folder that is not trusted",
                f"type the folder:  --registry {self.root}   or add it to  trusted  in config.toml",
            )

    def folder(self, kind: str) -> Path:
        """The folder of a kind: `backbones`, `datasets`, `saes`, `tasks` or `leaderboards`."""
        if kind in ("tasks", "leaderboards"):
            return self.root / kind
        nested = self.root / "registry" / kind
        return nested if nested.is_dir() else self.root / kind


@dataclass(frozen=True)
class Shelf(Generic[Spec]):
    """All entries of one kind, by name, in search order."""

    kind: str
    spec: type[Spec]
    origins: tuple[Origin, ...]
    read: dict[str, Spec] = field(default_factory=dict, repr=False)  # entries read so far

    @cached_property
    def files(self) -> dict[str, list[tuple[Origin, Path]]]:
        """Name -> the files that define it, the winning one first."""
        found: dict[str, list[tuple[Origin, Path]]] = {}
        for origin in self.origins:
            folder = origin.folder(self.kind)
            for path in sorted(folder.rglob("*.toml")):
                name = path.relative_to(folder).with_suffix("").as_posix()
                found.setdefault(name, []).append((origin, path))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.files))

    def origin(self, name: str) -> Origin:
        """The content folder an entry comes from."""
        self.path(name)
        return self.files[name][0][0]

    def path(self, name: str) -> Path:
        """The file of an entry. Errors: NotFound with the nearest three and where it looked."""
        if name not in self.files:
            raise not_found(self.kind, name, self.files, self.looked_in)
        return self.files[name][0][1]

    @property
    def looked_in(self) -> list[str]:
        return [str(origin.folder(self.kind)) for origin in self.origins]

    def get(self, name: str) -> Spec:
        """The entry, read strictly. Errors: NotFound, SpecError (the file, or a name twice)."""
        if name not in self.read:
            spec = read_spec(self.spec, self.path(name), name)
            for origin, path in self.files[name][1:]:
                if spec.replaces not in (origin.label, str(path)):
                    raise SpecError(
                        f"the name '{name}' is defined twice: {spec.path} and {path}",
                        f'rename one, or write  replaces = "{origin.label}"  in {spec.path}',
                    )
            self.read[name] = spec
        return self.read[name]

    def match(self, patterns: Iterable[str]) -> list[str]:
        """Names that match, in the order of the patterns. A pattern without a match: NotFound."""
        chosen: dict[str, None] = {}
        for pattern in patterns:
            names = [n for n in self if fnmatchcase(n, pattern)] if is_glob(pattern) else [pattern]
            if not names:
                raise not_found(self.kind, pattern, self.files, self.looked_in)
            for name in names:
                self.path(name)
                chosen[name] = None
        return list(chosen)


def not_found(kind: str, name: str, known: Iterable[str], looked_in: Iterable[str]) -> NotFound:
    """The error for an unknown name: the nearest three, and where it was looked for."""
    known = sorted(known)
    singular = {"saes": "SAE", "entries": "entry"}.get(kind, kind.removesuffix("s"))
    ls = "saebench ls" if kind == "entries" else f"saebench ls {kind}"
    lowered = {k.lower(): k for k in reversed(known)}
    near = [lowered[n] for n in get_close_matches(name.lower(), lowered, n=3, cutoff=0.4)]
    where = "\n".join(f"    {place}" for place in looked_in)
    shown = near or known[:3]
    hint = f"did you mean {', '.join(shown)}?" if near else f"known: {', '.join(shown)}, …"
    if not known:
        hint = "there are none yet"
    return NotFound(f"no {singular} is called '{name}'; looked in\n{where}", f"{hint}  ({ls})")


class Registry:
    """Everything that can be measured, by name. Reads names at once and entries when asked."""

    def __init__(self, origins: tuple[Origin, ...]) -> None:
        self.origins = origins
        self.backbones = Shelf("backbones", BackboneSpec, origins)
        self.datasets = Shelf("datasets", DatasetSpec, origins)
        self.saes = Shelf("saes", SaeSpec, origins)
        self.boards = Shelf("leaderboards", BoardSpec, origins)

    @classmethod
    def load(cls, extra: Iterable[str | Path] = ()) -> Registry:
        """The registry over the whole search path. Errors: UsageError for a folder that is not."""
        return cls(tuple(search_path(extra)))

    def backbone(self, name: str) -> BackboneSpec:
        return self.backbones.get(name)

    def buildable(self, name: str) -> BackboneSpec:
        """A backbone that is about to be built. Errors: UsageError for a loader not trusted."""
        spec = self.backbones.get(name)
        if ":" in spec.loader:
            self.backbones.origin(name).require_trust(f"loader = '{spec.loader}' of {spec.path}")
        return spec

    def dataset(self, name: str) -> DatasetSpec:
        return self.datasets.get(name)

    def sae(self, name: str) -> SaeSpec:
        return self.saes.get(name)

    def board(self, name: str) -> BoardSpec:
        return self.boards.get(name)

    @cached_property
    def task_files(self) -> dict[str, tuple[Origin, Path]]:
        """Task name (the file's stem) -> where it is. Nothing is executed."""
        found: dict[str, tuple[Origin, Path]] = {}
        for origin in self.origins:
            for path in sorted(origin.folder("tasks").glob("*.py")):
                if path.stem.startswith("_"):
                    continue
                if path.stem in found:
                    first = found[path.stem][1]
                    raise SpecError(
                        f"the task '{path.stem}' is defined twice: {first} and {path}",
                        "rename one of the two files",
                    )
                found[path.stem] = (origin, path)
        return found

    def task_path(self, name: str) -> tuple[Origin, Path]:
        """The file of a task. Errors: NotFound."""
        if name not in self.task_files:
            looked = [str(origin.folder("tasks")) for origin in self.origins]
            raise not_found("tasks", name, self.task_files, looked)
        return self.task_files[name]

    def match_tasks(self, patterns: Iterable[str]) -> list[str]:
        """Task names that match the patterns; all of them when there are none."""
        chosen: dict[str, None] = {}
        for pattern in patterns or ("*",):
            names = [n for n in self.task_files if fnmatchcase(n, pattern)]
            if not names:
                self.task_path(pattern)
            chosen.update(dict.fromkeys(names))
        return list(chosen)


def search_path(extra: Iterable[str | Path] = ()) -> Iterator[Origin]:
    """The content folders, the first of them strongest. Folders the user typed must exist."""
    for typed in extra:
        root = Path(typed).expanduser()
        if not root.is_dir():
            raise UsageError(f"--registry {typed}: there is no such folder")
        yield Origin(str(typed), root, trusted=True)
    trusted = _trusted_in_configuration()
    for part in filter(None, os.environ.get("SAEBENCH_PATH", "").split(os.pathsep)):
        root = Path(part).expanduser()
        if not root.is_dir():
            raise UsageError(f"SAEBENCH_PATH names {part}, and there is no such folder")
        yield Origin(part, root, trusted=root.resolve() in trusted)
    config = paths.user_config()
    if config.is_dir():
        yield Origin("user", config, trusted=config.resolve() in trusted)
    yield from _entry_points()
    yield Origin("built-in", paths.CONTENT, trusted=True)


def _trusted_in_configuration() -> set[Path]:
    """`trusted = ["/a/folder", …]` in the user's config.toml: Python from there may run."""
    path = paths.user_config() / "config.toml"
    if not path.is_file():
        return set()
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from None
    trusted = raw.pop("trusted", [])
    if raw or not isinstance(trusted, list) or not all(isinstance(t, str) for t in trusted):
        raise SpecError(f'{path}: the one key is  trusted = ["folder", …]')
    return {Path(item).expanduser().resolve() for item in trusted}


def _entry_points() -> Iterator[Origin]:
    """Installed packages that carry content: the entry point names a package that is a folder."""
    from importlib.metadata import entry_points
    from importlib.util import find_spec

    for point in entry_points(group="saebench.content"):
        found = find_spec(point.value)
        for location in (found.submodule_search_locations or []) if found else []:
            yield Origin(point.name, Path(location), trusted=True)
