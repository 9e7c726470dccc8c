"""CLIP-Scope: the published files, a training's checkpoint, and the state dict alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Case, D, S, as64, numbers, rows, top

K = 12
SCALING = {"input_mean": numbers(D, seed=5).tolist(), "input_std": [0.5 + i / 4 for i in range(D)]}


def state(s: int = S) -> dict[str, Any]:
    return {"pre_b": numbers(D, seed=4), "enc": numbers(D, s, seed=2), "dec": rows(s)}


def published(s: int = S) -> dict[str, Any]:
    return {"n_features": s, "d_in": D, "k": K if s > D else 6, "model_state_dict": state(s)}


def training(s: int = S) -> dict[str, Any]:
    return {
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "model_state_dict": state(s),
        "token_count": 1200013184,
        "dead_latents": torch.zeros(s),
        "n_iter": 1200013184,
        "log_id": "2024-11-06_a1b2",
    }


def _case(label: str, saved: dict[str, Any], semantics: Mapping[str, Any]) -> Case:
    weights = saved.get("model_state_dict", saved)
    k = saved.get("k", K)

    def write(folder: Path) -> Path:
        torch.save(saved, folder / "1200013184.pt")
        return folder / "1200013184.pt"

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        E, W, b = as64(weights["enc"], weights["dec"], weights["pre_b"])
        m = np.array(semantics.get("input_mean", 0.0))
        std = np.array(semantics.get("input_std", 1.0))
        pre = ((x - m) / std - b) @ E
        z = pre * top(pre, k)
        return z, (z @ W + b) * std + m

    return Case(f"clip-scope/{label}", "clip-scope", write, forward, semantics)


CASES = [
    _case("published", published(), SCALING),
    _case("published-square", published(D), SCALING),
    _case("published-raw", published(), {"input": "raw"}),
    _case("training", training(), {**SCALING, "k": K}),
    _case("bare", state(), {**SCALING, "k": K}),
]
