"""The HugoFry family: {"cfg" or "config", "state_dict"}, the configuration an object or a dict."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Case, D, S, as64, numbers, relu, rows
from tests.checkpoints.prisma import as_state
from tests.foreign_classes import foreign

PATCHSAE = "src.sae_training.config.ViTSAERunnerConfig"
HUGOFRY = "sae_training.config.ViTSAERunnerConfig"
CONFIG = {
    "custom_clip_ckpt_path": None,
    "class_token": None,
    "image_width": 224,
    "image_height": 224,
    "model_name": "openai/clip-vit-base-patch16",
    "module_name": "resid",
    "block_layer": -2,
    "dataset_path": "evanarlian/imagenet_1k_resized_256",
    "d_in": D,
    "d_sae": S,
    "expansion_factor": 2,
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "b_dec_init_method": "geometric_median",
    "gated_sae": None,
    "use_ghost_grads": True,
}

Write = Callable[[Path, Mapping[str, Any], Mapping[str, torch.Tensor]], Path]


def state(s: int = S) -> dict[str, torch.Tensor]:
    return {
        "W_enc": numbers(D, s, seed=2),
        "b_enc": numbers(s, seed=3),
        "W_dec": rows(s, unit=True),
        "b_dec": numbers(D, seed=4),
    }


def saved(path: str, key: str = "cfg") -> Write:
    """As `torch.save` writes it with a configuration of the class `path`."""

    def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Any]) -> Path:
        with foreign(path, config) as cfg:
            torch.save({key: cfg, "state_dict": as_state(weights)}, folder / "sae.pt")
        return folder / "sae.pt"

    return write


def as_dict(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Any]) -> Path:
    torch.save({"config": dict(config), "state_dict": as_state(weights)}, folder / "sae.pt")
    return folder / "sae.pt"


def zipped(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Any]) -> Path:
    with foreign(HUGOFRY, config) as cfg, gzip.open(folder / "sae.pkl.gz", "wb") as file:
        pickle.dump({"cfg": cfg, "state_dict": as_state(weights)}, file)
    return folder / "sae.pkl.gz"


def alone(folder: Path, _: Mapping[str, Any], weights: Mapping[str, Any]) -> Path:
    torch.save(as_state(weights), folder / "sae.pt")
    return folder / "sae.pt"


def _case(
    name: str, write: Write, *, s: int = S, stated: str | None = None, **changes: Any
) -> Case:
    weights, config = state(s), {**CONFIG, "d_sae": s, "expansion_factor": s // D, **changes}

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        E, e, W, b = as64(*(weights[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")))
        z = relu((x - b) @ E + e)
        return z, z @ W + b

    return Case(
        f"patchsae/{name}",
        "patchsae",
        lambda folder: write(folder, config, weights),
        forward,
        stated=stated,
    )


CASES = [
    _case("object", saved(PATCHSAE)),
    _case("square", saved(PATCHSAE), s=D),
    _case("config", saved(PATCHSAE, "config"), class_token=True),
    _case("dict", as_dict, gated_sae=False),
    _case("gz", zipped, block_layer=10, class_token=True),
    _case("alone", alone, stated="patchsae"),
]
