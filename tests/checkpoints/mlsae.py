"""mlsae: model.safetensors and config.json of the hub mixin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.checkpoints import Case, D, S, as64, layer_norm, numbers, relu, rows, top


def config(s: int, k: int, *, standardize: bool) -> dict[str, Any]:
    return {
        "auxk": 256,
        "dead_steps_threshold": 9765625,
        "dead_threshold": 0.001,
        "k": k,
        "n_inputs": D,
        "n_latents": s,
        "standardize": standardize,
    }


def state(s: int = S) -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": numbers(s, D, seed=2),
        "decoder.weight": rows(s, unit=True).T.contiguous(),
        "pre_encoder_bias": numbers(D, seed=4),
        "last_nonzero": torch.zeros(s, dtype=torch.int64),
    }


def _case(
    label: str,
    s: int = S,
    k: int = 12,
    *,
    standardize: bool = True,
    semantics: Mapping[str, Any] | None = None,
) -> Case:
    weights = state(s)

    def write(folder: Path) -> Path:
        save_file(weights, folder / "model.safetensors")
        if not semantics:
            text = json.dumps(config(s, k, standardize=standardize))
            (folder / "config.json").write_text(text)
        return folder / "model.safetensors"

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        names = ("encoder.weight", "decoder.weight", "pre_encoder_bias")
        E, W, b = as64(*(weights[name] for name in names))
        u, mean, std = layer_norm(x) if standardize else (x, 0.0, 1.0)
        pre = (u - b) @ E.T
        z = relu(pre) * top(pre, k)
        return z, (z @ W.T + b) * std + mean

    return Case(f"mlsae/{label}", "mlsae", write, forward, semantics or {})


CASES = [
    _case("standardize"),
    _case("square", D, 6),
    _case("raw", standardize=False),
    _case("without-config", semantics={"k": 12, "row_norm": "layer_norm"}),
]
