"""The entry of an SAE, checked against its backbone, with the hash of its file."""

from __future__ import annotations

from pathlib import Path

from saebench.coders import check_fit
from saebench.errors import UsageError
from saebench.registry import Registry
from saebench.scaffold import relative, weights_file
from saebench.scaffold.texts import SAE
from saebench.specs import SaeSpec
from saebench.strict import parse_spec
from saebench.weights import file_sha256


def sae_entry(
    registry: Registry,
    name: str,
    path: Path,
    weights: str | None,
    backbone: str | None,
    site: str | None,
    tokens: str,
) -> str:
    """The text of an entry at `path`. Errors: UsageError; NotFound, Mismatch (backbone, site)."""
    if weights is None:
        raise UsageError("an SAE is a file", f"saebench new sae {name} --weights FILE")
    file = weights_file(weights)
    owner = registry.backbone(backbone or name.partition("/")[0])
    chosen = site or owner.site
    raw = {
        "backbone": owner.name,
        "site": chosen,
        "tokens": tokens,
        "weights": {"file": relative(file, path.parent)},
    }
    declared = check_fit(owner, parse_spec(SaeSpec, raw, name=name, path=str(path)))
    return SAE.format(
        backbone=owner.name,
        site=chosen,
        sites=", ".join(owner.sites),
        tokens=tokens,
        kinds=", ".join(declared.kinds),
        file=raw["weights"]["file"],
        sha256=file_sha256(file),
    )
