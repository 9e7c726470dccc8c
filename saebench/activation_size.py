"""What `--store tokens` will take on the disk, from the entries alone: before anything is computed.

A bottleneck takes images x tokens x width numbers. A branch takes its own, and what its block is
given, which no entry says: counted as the widest bottleneck of as many tokens, once for a block.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from saebench.paths import user_store
from saebench.plan import Plan
from saebench.registry import Registry
from saebench.specs import BackboneSpec, SiteSpec
from saebench.units import root_sites

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def image_bytes(backbone: BackboneSpec, sites: Iterable[str], dtype: str) -> int:
    """Bytes that one image takes at these sites of a backbone."""
    numbers: dict[tuple[str, str], int] = {}
    for name in sites:
        site = backbone.sites[name]
        numbers[site.path, site.side] = site.tokens * site.width
        if site.kind == "branch":
            block = site.path.rpartition(".")[0]
            numbers[block, "block"] = site.tokens * _entry_width(backbone, site)
    return sum(numbers.values()) * _BYTES[dtype]


def _entry_width(backbone: BackboneSpec, branch: SiteSpec) -> int:
    bottlenecks = [site for site in backbone.sites.values() if site.kind == "bottleneck"]
    alike = [site.width for site in bottlenecks if site.tokens == branch.tokens]
    return max(alike, default=branch.width)


def plan_bytes(plan: Plan, registry: Registry) -> int:
    """Bytes that a run keeps, where nothing of it is there yet."""
    total = 0
    for group in plan.groups:
        refs = [ref for wave in group.waves for ref in wave.coders]
        # Of several spliced together only the first one's site is captured.
        sites = {root_sites(registry, ref)[0] for ref in refs}
        total += group.source.n_images * image_bytes(group.backbone, sites, plan.config.dtype)
    return total


def size_line(plan: Plan, registry: Registry) -> str:
    """What a dry run says of it."""
    store = user_store()
    there = next(folder for folder in (store, *store.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    return (
        f"activations: {gigabytes(plan_bytes(plan, registry))}, less what is there already, in "
        f"{store / 'shards' / 'tokens'} ({gigabytes(free)} free)"
    )


def gigabytes(n: int) -> str:
    """In units of 1e9 bytes, to two digits or so."""
    return f"{n / 1e9:.3f} GB" if n < 1e9 else f"{n / 1e9:,.1f} GB"
