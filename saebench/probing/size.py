"""What the tables of a run's probes will take on the disk, from the entries alone.

    features  n (4 f + 8) bytes of the untouched activations, and of each coder's reconstructions
    codes     n (8 z + 16) bytes of each coder and pooling, z latents of an image that are not zero

n train images, features f wide. No entry says z: it is at most t k, for the t tokens that are
pooled and k active latents of a token as stated, and at most the dictionary. Where no k is stated
it is counted as the dictionary, which is far too many; where the weights are not here either, as 0.
How wide an embedding is no entry says: counted as the widest site.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass

from saebench.activation_size import gigabytes
from saebench.coders import CoderRef
from saebench.paths import user_store
from saebench.plan import Plan
from saebench.probe_features import Feature, covered, feature_of
from saebench.probe_options import (
    FULL,
    feature_width,
    latents_at_most,
    n_train_of,
    needs_probes,
)
from saebench.registry import Registry
from saebench.specs import SiteSpec
from saebench.units import root_site

_PLACE, _COUNT = 8, 16  # bytes of an image beside its features, beside its codes


@dataclass(frozen=True)
class ProbeSize:
    """images: the most that any probe of the run looks at. features, codes: bytes.

    unstated: coders of which no entry states how many latents are active.
    """

    images: int = 0
    features: int = 0
    codes: int = 0
    unstated: tuple[str, ...] = ()


def probe_size(plan: Plan, registry: Registry) -> ProbeSize:
    """Of all that is left to do, where nothing of it is in the store yet; codes from above."""
    clean: dict[object, int] = {}
    others: dict[object, tuple[int, int]] = {}  # reconstructions, codes
    images, unstated = 0, dict[str, None]()
    for unit in plan.todo:
        if not needs_probes(unit.task):
            continue
        n, ref = n_train_of(unit), unit.coder
        site = unit.backbone.sites[root_site(registry, ref)]
        kinds = covered(site, ref)
        feature = feature_of(unit.options["feature"], kinds, ref.label)
        few = unit.options["shots"] != FULL
        sample = (unit.options["shots"], unit.options["label"] if few else "")
        pass_ = (unit.backbone.name, unit.source.spec.name, sample)
        place = (root_site(registry, ref), tuple(kinds), feature.name)
        dense = n * (4 * feature_width(unit, site, feature) + _PLACE)
        per_token = _active(ref, site)
        if per_token is None:
            unstated[ref.name] = None
        images = max(images, n)
        clean[pass_, place] = dense
        others[pass_, place, ref] = dense, n * _code_bytes(ref, site, feature, per_token)
    reconstructions = sum(dense for dense, _ in others.values())
    codes = sum(codes for _, codes in others.values())
    return ProbeSize(images, sum(clean.values()) + reconstructions, codes, tuple(unstated))


def probe_line(plan: Plan, registry: Registry) -> str | None:
    """What a dry run says of it; None where nothing that is left to do reads probes."""
    size = probe_size(plan, registry)
    if not size.images:
        return None
    store = user_store()
    there = next(folder for folder in (store, *store.parents) if folder.is_dir())
    counted = ""
    if size.unstated:
        first, more = size.unstated[0], len(size.unstated) - 1
        who = f"{first} and {more} more" if more else first
        counted = f" (all latents of {who}, of which no entry states how many are active)"
    return (
        f"probes: up to {size.images:,} train images; features {gigabytes(size.features)}, codes "
        f"at most {gigabytes(size.codes)}{counted}, less what is there already, in "
        f"{store / 'shards'} ({gigabytes(shutil.disk_usage(there).free)} free)"
    )


def _active(ref: CoderRef, site: SiteSpec) -> int | None:
    """Latents of a token that are active, as its entry states; None where it does not."""
    if ref.control == "identity":
        return site.width
    if ref.control in ("zero", "mean"):
        return 0
    if ref.k is not None:
        return ref.k
    assert ref.sae is not None
    stated = ref.sae.semantics.get("k") or ref.sae.l0
    return None if stated is None else math.ceil(stated)


def _code_bytes(ref: CoderRef, site: SiteSpec, feature: Feature, per_token: int | None) -> int:
    """Bytes of an image's codes, of all poolings; without its dictionary where none is known."""
    if per_token == 0:
        return 0
    dictionary = latents_at_most(ref, site)
    nonzero = 0
    for part in feature.code_parts:
        tokens = part.stop - part.start
        known = [n for n in (dictionary, per_token and tokens * per_token) if n is not None]
        nonzero += min(known, default=0)
    return len(feature.poolings) * (8 * nonzero + _COUNT)
