"""What makes an SAE the one that is asked for: its recipe, its rows, its start and its file.

What only decides how fast it is made (device, workers, images at once) is no part of it; nor is
the memory cap, as long as all rows fit into it and are shuffled as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saebench.data import Access, open_dataset
from saebench.registry import Registry
from saebench.specs import BackboneSpec, DatasetSpec, SaeSpec, semantic_fields
from saebench.train.config import TrainConfig
from saebench.train.recipe import Recipe
from saebench.train.stream import images_a_window
from saebench.units import backbone_identity
from saebench.waves import memory_bytes
from saebench.weights import weights_sha256


def rows_identity(
    config: TrainConfig,
    registry: Registry,
    backbone: BackboneSpec,
    site: str,
    kinds: Sequence[str],
    parents: Sequence[SaeSpec],
    datasets: Sequence[str],
    d_model: int,
) -> dict[str, Any]:
    """Everything that decides the rows and their order, as plain JSON.

    Errors: WeightsError for weights that are not there, DataError for a split that is not.
    """
    layout = backbone.sites[site].kinds
    n_tokens = sum(layout[kind].stop - layout[kind].start for kind in kinds)
    found, n_images = [], 0
    for name in datasets:
        spec = registry.dataset(name)
        manifest = open_dataset(spec, access_of(config, spec)).manifest(spec.train)
        n = min(len(manifest), config.train_limit or len(manifest))
        n_images += n
        fields = {**semantic_fields(spec), "test": None}  # nothing is trained on that split
        found.append({"name": name, **fields, "manifest": manifest.sha256, "n_images": n})
        if config.bad_images != "fail":
            found[-1]["bad_images"] = config.bad_images
    memory = memory_bytes(config.memory)
    window = images_a_window(n_images, n_tokens, d_model, config.batch_rows, memory)
    return {
        "backbone": backbone_identity(backbone, site),
        "site": site,
        "tokens": list(kinds),
        "parents": [{**semantic_fields(spec), "weights": weights_sha256(spec)} for spec in parents],
        "datasets": found,
        "window": None if window == n_images else window,
    }


def access_of(config: TrainConfig, spec: DatasetSpec) -> Access:
    """Where a call looks for a dataset, and how much of it it takes where that is a stream."""
    return Access.of(config.data_root, {spec.train: config.train_limit})


def identity_of(recipe: Recipe, rows: dict[str, Any], save_dtype: str) -> dict[str, Any]:
    """What the file of an SAE carries, and what another call's has to equal to be the same."""
    return {"recipe": recipe.plain(), **rows, "save_dtype": save_dtype}
