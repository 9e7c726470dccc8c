"""Writes a finished SAE: a safetensors file, and beside it the TOML entry that makes it findable.

    <out>/saes/<backbone>/<name>.safetensors
    <out>/saes/<backbone>/<name>.toml
The entry is written last and as a whole, so that an entry is never there without its weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saebench import paths
from saebench.atomic import write_bytes
from saebench.errors import SaebenchError, UsageError
from saebench.formats.content import sniff
from saebench.identity import canonical_json
from saebench.registry import Registry
from saebench.specs import SaeSpec
from saebench.train.fit import Measured
from saebench.train.recipe import Recipe
from saebench.weights import verified_path


@dataclass(frozen=True)
class Place:
    """What an entry says of the rows its SAE was trained on."""

    backbone: str
    site: str
    tokens: str
    trained_on: str


def entry_path(out: Path, name: str) -> Path:
    """The TOML file of the entry `name` (backbone included) in a content folder."""
    nested = out / "registry"
    return (nested if nested.is_dir() else out) / "saes" / f"{name}.toml"


def check_out(out: Path) -> None:
    """Errors: UsageError for a folder inside an installed package, or that cannot be written."""
    if paths.CONTENT.name == "_content" and paths.CONTENT in out.resolve().parents:
        raise UsageError(
            f"--out {out} lies inside the installed package", "choose a folder of your own"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be made: {error}", "choose another folder") from None
    if not os.access(out, os.W_OK):
        raise UsageError(f"--out {out} cannot be written", "choose another folder")


def is_done(
    registry: Registry,
    path: Path,
    name: str,
    place: Place,
    recipe: Recipe,
    identity: Mapping[str, Any],
) -> bool:
    """Whether this very SAE is there already, by the identity in its file.

    A file of before there were identities is held to what its entry says.
    Errors: UsageError when the name belongs to another SAE, here or elsewhere in the registry.
    """
    if name not in registry.saes.files:
        return False
    found = registry.saes.path(name)
    if found.resolve() != path.resolve():
        raise UsageError(
            f"there is already an SAE called '{name}': {found}",
            "call the new one something else:  --name NAME",
        )
    spec = registry.sae(name)
    same = (spec.backbone, spec.site, spec.tokens, spec.trained_on) == (
        place.backbone,
        place.site,
        place.tokens,
        place.trained_on,
    )
    if not same or (spec.recipe, spec.seed) != (recipe.title, recipe.seed):
        raise _made_otherwise(name, found)
    try:
        weights = verified_path(spec)
        written = _written_identity(weights) if weights else None
    except (SaebenchError, ValueError):
        return False
    if written is not None and canonical_json(written) != canonical_json(identity):
        keys = sorted(written.keys() | identity.keys())
        raise _made_otherwise(
            name,
            found,
            [k for k in keys if canonical_json(written.get(k)) != canonical_json(identity.get(k))],
        )
    return True


def _written_identity(weights: Path) -> dict[str, Any] | None:
    """The identity in the header of a weights file. Errors: WeightsError, ValueError."""
    return json.loads(sniff(weights).metadata["config"])["extra"].get("identity")


def _made_otherwise(name: str, found: Path, keys: Sequence[str] = ()) -> UsageError:
    differs = f" (another {', '.join(keys)})" if keys else ""
    return UsageError(
        f"'{name}' is there and was made in another way{differs}: {found}",
        "give --overwrite to replace it, or --name NAME to keep both",
    )


def write_entry(
    path: Path,
    file: str,
    sha256: str,
    place: Place,
    recipe: Recipe,
    measured: Measured,
    licence: str = "",
) -> None:
    """Write the TOML of an SAE whose weights lie beside it as `file`."""
    share = measured.dead / recipe.d_sae
    spec = {
        "backbone": place.backbone,
        "site": place.site,
        "tokens": place.tokens,
        "format": "saebench",
        "architecture": recipe.arch,
        "recipe": recipe.title,
        "seed": recipe.seed,
        "trained_on": place.trained_on,
        "l0": round(measured.l0, 2),
        "description": (
            f"{recipe.setting}; on {measured.n_rows:,} rows of its training images "
            f"L0 {measured.l0:.2f}, fvu {measured.fvu:.4f}, dead {share:.1%} of {recipe.d_sae}"
        ),
    }
    if licence:
        spec["licence"] = licence
    lines = [f"{key} = {_toml(value)}" for key, value in spec.items()]
    lines += ["", "[weights]", f"file = {_toml(file)}", f"sha256 = {_toml(sha256)}", ""]
    assert set(spec) <= set(SaeSpec.__dataclass_fields__)
    write_bytes(path, "\n".join(lines).encode())


def _toml(value: str | int | float) -> str:
    """A TOML literal. JSON's strings are TOML's basic strings."""
    return json.dumps(value, ensure_ascii=False)
