"""What the tables of a run's probes will take on the disk, from the entries alone.

    features  n (4 f + 8) bytes of the untouched activations, and of each coder's reconstructions
    codes     n (8 z + 16) bytes of each coder and pooling, z latents of an image that are not zero
    fits      8 c (2 f + p s + 188) bytes of each unit: of probes on x and x̂, on codes in each of p
              poolings, and of k-sparse ones

n train images, features f wide, s latents, c classes. No entry says z: it is at most t k, for the t
tokens that are pooled and k active latents of a token as stated by the entry, or by the header of a
weights file of saebench's own that is here; and at most the dictionary. Where no k is stated it is
counted as the dictionary, which is far too many; where the weights are not here either, as 0. s is
what such a header says, else what the weights' bytes allow. How wide an embedding is no entry says:
counted as the widest site.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from saebench.activation_size import gigabytes
from saebench.coders import CoderRef
from saebench.errors import WeightsError
from saebench.formats.containers import META, parse_json, read_header
from saebench.formats.native import NAME
from saebench.paths import user_store
from saebench.plan import Plan
from saebench.probe_features import Feature, covered, feature_of
from saebench.probe_options import (
    FULL,
    feature_width,
    latents_at_most,
    n_train_of,
    needs_probes,
    probe_coefficients,
)
from saebench.registry import Registry
from saebench.specs import SiteSpec
from saebench.units import root_site
from saebench.weights import local_path

_PLACE, _COUNT = 8, 16  # bytes of an image beside its features, beside its codes


@dataclass(frozen=True)
class ProbeSize:
    """images: the most that any probe of the run looks at. features, codes, fits: bytes.

    passes: over train images, of `seen` images in all; each wave makes its own for each sample.
    unstated: coders of which no entry states how many latents are active.
    """

    images: int = 0
    features: int = 0
    codes: int = 0
    fits: int = 0
    passes: int = 0
    seen: int = 0
    unstated: tuple[str, ...] = ()


def probe_size(plan: Plan, registry: Registry) -> ProbeSize:
    """Of all that is left to do, where nothing of it is in the store yet; codes from above."""
    clean: dict[object, int] = {}
    others: dict[object, tuple[int, int]] = {}  # reconstructions, codes
    passes: dict[object, int] = {}  # of each wave and sample: images
    images, fits, unstated = 0, 0, dict[str, None]()
    waves = [wave for group in plan.groups for wave in group.waves]
    of_wave = {unit: i for i, wave in enumerate(waves) for unit in wave.units}
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
        header = _header(ref)
        dictionary = header.get("d_sae", latents_at_most(ref, site))
        per_token = _active(ref, site, header)
        if per_token is None:
            unstated[ref.name] = None
        images = max(images, n)
        passes[of_wave[unit], pass_] = n
        fits += 8 * probe_coefficients(unit, site, dictionary or 0)
        clean[pass_, place] = dense
        others[pass_, place, ref] = dense, n * _code_bytes(dictionary, feature, per_token)
    reconstructions = sum(dense for dense, _ in others.values())
    codes = sum(codes for _, codes in others.values())
    features = sum(clean.values()) + reconstructions
    seen = sum(passes.values())
    return ProbeSize(images, features, codes, fits, len(passes), seen, tuple(unstated))


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
    passes = f" in {size.passes} passes, {size.seen:,} in all" if size.passes > 1 else ""
    return (
        f"probes: up to {size.images:,} train images{passes}; features "
        f"{gigabytes(size.features)}, codes at most {gigabytes(size.codes)}{counted}, fits at most "
        f"{gigabytes(size.fits)}, less what is there already, in {store} "
        f"({gigabytes(shutil.disk_usage(there).free)} free)"
    )


def _header(ref: CoderRef) -> Mapping[str, int]:
    """What a weights file of saebench's own says of its SAE, if it is here; else nothing."""
    if ref.sae is None or ref.sae.weights.file is None:
        return {}
    try:
        said = read_header(local_path(ref.sae, ref.sae.weights.file)).get(META, {})
        config = parse_json(said["config"], "its config") if said.get("format") == NAME else {}
    except (OSError, WeightsError, KeyError):
        return {}  # what is wrong with it is said when it is loaded
    return {name: value for name, value in config.items() if isinstance(value, int)}


def _active(ref: CoderRef, site: SiteSpec, header: Mapping[str, int]) -> int | None:
    """Latents of a token that are active, as is stated; None where it is not."""
    if ref.control == "identity":
        return site.width
    if ref.control in ("zero", "mean"):
        return 0
    if ref.k is not None:
        return ref.k
    assert ref.sae is not None
    stated = ref.sae.semantics.get("k") or header.get("k") or ref.sae.l0
    return None if stated is None else math.ceil(stated)


def _code_bytes(dictionary: int | None, feature: Feature, per_token: int | None) -> int:
    """Bytes of an image's codes, of all poolings; without its dictionary where none is known."""
    if per_token == 0:
        return 0
    nonzero = 0
    for part in feature.code_parts:
        tokens = part.stop - part.start
        known = [n for n in (dictionary, per_token and tokens * per_token) if n is not None]
        nonzero += min(known, default=0)
    return len(feature.poolings) * (8 * nonzero + _COUNT)
