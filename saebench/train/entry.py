"""Writes a finished SAE: a safetensors file, and beside it the TOML entry that makes it findable.

    <out>/saes/<backbone>/<name>.safetensors
    <out>/saes/<backbone>/<name>.toml
The entry is written last and as a whole, so that an entry is never there without its weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from saebench import paths
from saebench.atomic import write_bytes
from saebench.errors import SaebenchError, UsageError
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


def is_done(registry: Registry, path: Path, name: str, place: Place, recipe: Recipe) -> bool:
    """Whether this very SAE is there already.

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
        raise UsageError(
            f"'{name}' is there and was made in another way: {found}",
            "give --overwrite to replace it, or --name NAME to keep both",
        )
    try:
        verified_path(spec.weights, spec.path)
    except SaebenchError:
        return False
    return True


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
