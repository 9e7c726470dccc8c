"""`saebench.load_sae`: an SAE by the name of its entry, or straight from a file, folder or hub.

    sae = saebench.load_sae("tiny-vit/topk-k8")
    sae = saebench.load_sae("path/to/sae.pt", input="raw")
    sae = saebench.load_sae("hf-hub:owner/name/layer_10", device="cuda")
    codes = sae.encode(x_nd)          # raw activations [n d]; codes.dense() [n s]
    recon_nd = sae.decode(codes)      # raw activations again

No backbone is built, and no code of a file is run.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saebench.address import locate
from saebench.errors import SpecError, UsageError
from saebench.formats import facts_of, read_content, read_entry
from saebench.formats.content import sniff
from saebench.formats.facts import Facts
from saebench.formats.statistics import read_statistics
from saebench.registry import Registry, not_found
from saebench.rows import choose_device
from saebench.saes import Sae
from saebench.specs import SaeSpec
from saebench.weights import HUB_MODEL


def load_sae(
    source: str | Path,
    *,
    format: str | None = None,
    registry: Registry | str | Path | None = None,
    device: str | torch.device = "cpu",
    statistics: str | Path | None = None,
    **semantics: Any,
) -> Sae:
    """An SAE whose encode and decode take and give raw activations [n d], float32.

    source: the name of an entry, a weights file, a checkpoint's folder, or
    `hf-hub:owner/name[@revision][/path]`. format: only where the file alone does not tell.
    registry: a content folder searched before all others. device: `cpu`, `cuda`, or `auto`.
    semantics: what the file does not say (docs/add_an_sae.md); statistics: a file that
    `saebench estimate` wrote.
    Errors: NotFound (no such entry or path); SpecError (a fact that is missing, is said otherwise
    by the file or the entry, or is none of this format); WeightsError (no weights, damaged).
    """
    where = choose_device(str(device))
    given = {name: _plain(value) for name, value in semantics.items()}
    estimated = read_statistics(Path(statistics)) if statistics is not None else {}
    spec = _entry(source, registry)
    if spec is None:
        checkpoint = locate(source, str(source))
        content = sniff(checkpoint.path, checkpoint.configurations)
        return read_content(content, Facts(given, estimated=estimated), format).to(where)
    if format is not None and spec.format not in (None, format):
        raise SpecError(
            f"format = '{format}' is given, and {spec.path} says '{spec.format}'", "keep one"
        )
    facts = facts_of(spec).also(given, "given").also(estimated, "estimated")
    return read_entry(replace(spec, format=format or spec.format), facts).to(where)


def _entry(source: str | Path, registry: Registry | str | Path | None) -> SaeSpec | None:
    """The entry that a source names; None for a place. Errors: NotFound, UsageError for both."""
    if isinstance(source, Path) or source.startswith(HUB_MODEL):
        return None
    there = os.path.exists(os.path.expanduser(source))
    if there and source.startswith((".", "/", "~")):
        return None
    if not isinstance(registry, Registry):
        registry = Registry.load(() if registry is None else (registry,))
    if source in registry.saes.files:
        if there:
            raise UsageError(
                f"'{source}' is an SAE of the registry, and a file or folder here too",
                f"a file or folder:  ./{source}",
            )
        return registry.sae(source)
    if there:
        return None
    raise not_found(
        "saes", source, registry.saes, [*registry.saes.looked_in, str(Path(source).absolute())]
    )


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as Python's own."""
    single = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if single else value
