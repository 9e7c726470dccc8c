"""The files that belong to an SAE's weights: configurations beside them, statistics of an entry.

What they say decides what the weights mean, so they are part of a unit's identity
(`saebench.units`): configurations by their bytes, statistics by their tensors, whatever is noted of
their origin. No configuration is parsed here.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from pathlib import Path

from saebench import hub
from saebench.errors import SpecError, WeightsError
from saebench.identity import file_sha256
from saebench.specs import SaeSpec
from saebench.tensorfile import tensors_sha256
from saebench.weights import local_path, wanted

CONFIGS = (
    "cfg.json",
    "config.json",
    "config.yaml",
    "config.yml",
    "training_config.json",
    "run_config.json",
    "hyperparams.json",
    "activation_scaler.json",
    "activation_whitening.safetensors",
)
"""Names of configurations that are looked for beside a local file."""

_INSIDE = "checkpoints"  # a folder of files whose configuration lies one folder up


def usual(weights: Path) -> dict[str, Path]:
    """The configurations beside a local weights file, by their usual names.

    Those of a file in a folder `checkpoints` lie one folder up.
    """
    here = weights.absolute().parent
    found: dict[str, Path] = {}
    for name in usual_names(weights.absolute().as_posix()):
        if (file := Path(posixpath.normpath((here / name).as_posix()))).is_file():
            found.setdefault(_known(name), file)
    return found


def usual_names(weights: str) -> list[str]:
    """What configurations of a weights file are called, relative to its folder: nearest first."""
    folder, file = posixpath.split(weights)
    names = [*CONFIGS, f"{file.partition('.')[0]}.arch_ref"]
    above = posixpath.basename(folder) == _INSIDE
    return [*names, *(f"../{name}" for name in names if above)]


def beside_paths(spec: SaeSpec, weights: Path) -> dict[str, Path]:
    """The configurations of an entry's weights, on this machine, by the names formats know.

    Errors: WeightsError (missing, altered), SpecError (a name that leaves the folder, or is there
    twice).
    """
    declared = _declared(spec)
    if spec.weights.hub is not None:
        files = {_known(name): hub.fetch(file) for name, file in beside_wanted(spec).items()}
    elif not declared:
        return usual(weights)
    else:
        files = {_known(name): weights.parent / name for name in declared}
    for name, sha256 in declared.items():
        file = files[_known(name)]
        if not file.is_file():
            raise WeightsError(
                f"{spec.path or spec.name}: '{name}' is not beside the weights",
                f"it was looked for at {file}",
            )
        if sha256 and file_sha256(file) != sha256.lower():
            raise WeightsError(
                f"{file} is not the file that {spec.path or spec.name} describes: its sha256 is "
                f"{file_sha256(file)}, declared is {sha256}",
                "it was altered: get it again, or write the new sha256 under [weights.beside]",
            )
    return files


def beside_wanted(spec: SaeSpec) -> dict[str, hub.Wanted]:
    """The configurations that a hub entry declares, as files of its repository.

    Errors: SpecError, as `beside_paths`.
    """
    weights, file = spec.weights, wanted(spec)
    if file is None:
        return {}
    folder = posixpath.dirname(file.names[0])
    return {
        name: hub.Wanted(
            file.repo,
            (posixpath.normpath(posixpath.join(folder, name)),),
            spec.name,
            weights.revision or "",
            sha256.lower(),
        )
        for name, sha256 in _declared(spec).items()
    }


def beside_sha256(spec: SaeSpec) -> dict[str, str]:
    """What identifies the files that say what the weights mean, statistics included.

    Declared, else locked, else the files' own. Errors: as `weights_sha256`.
    """
    declared = {_known(name): sha256.lower() for name, sha256 in _declared(spec).items()}
    if spec.weights.hub is not None:
        for name, file in beside_wanted(spec).items():
            declared[_known(name)] = file.sha256 or hub.resolve(file).sha256
    elif spec.weights.file is not None and not all([declared, *declared.values()]):
        weights = local_path(spec, spec.weights.file)
        declared |= {name: file_sha256(p) for name, p in beside_paths(spec, weights).items()}
    if statistics := statistics_path(spec):
        declared["statistics"] = tensors_sha256(statistics)
    return declared


def statistics_path(spec: SaeSpec) -> Path | None:
    """The statistics file that an entry names under [semantics], relative to the entry.

    Errors: WeightsError where it is not there, SpecError.
    """
    name = spec.semantics.get("statistics")
    if name is None:
        return None
    if not isinstance(name, str):
        raise SpecError(f"{spec.path or spec.name}: semantics.statistics is the name of a file")
    path = Path(spec.path).parent / name
    if not path.is_file():
        raise WeightsError(
            f"{spec.path or spec.name}: semantics.statistics = '{name}' is not there",
            f"it was looked for at {path}; saebench estimate  writes it",
        )
    return path


def _known(name: str) -> str:
    """The name that formats know a file by: without its folder."""
    return posixpath.basename(name)


def _declared(spec: SaeSpec) -> Mapping[str, str]:
    """Names beside the weights, or one folder up -> sha256, as an entry declares them.

    Errors: SpecError for any other place, and for two names of one configuration.
    """
    where, known = spec.path or spec.name, dict[str, str]()
    for name in spec.weights.beside:
        parts = name.split("/")
        if name.startswith("/") or ".." in parts[1:] or "" in parts or "\\" in name:
            raise SpecError(
                f"{where}: '{name}' under [weights.beside] is not beside the weights",
                'a name in their folder, or one folder up: "../config.json"',
            )
        if (first := known.setdefault(_known(name), name)) != name:
            raise SpecError(
                f"{where}: '{first}' and '{name}' under [weights.beside] are both its "
                f"{_known(name)}",
                "keep the one that says what the weights mean",
            )
    return spec.weights.beside
