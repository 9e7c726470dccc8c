"""MSAE: the wrapper under a name that says the rest, the same under another name, and alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Case, D, S, as64, layer_norm, numbers, relu, rows, top

FACTOR = 0.4375


def state(s: int = S, *, tied: bool = False, jump: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {
        "pre_bias": numbers(D, seed=4),
        "encoder": numbers(D, s, seed=2),
        "latent_bias": numbers(s, seed=3),
        "decoder": rows(s),
        "latents_activation_frequency": torch.zeros(s, dtype=torch.int64),
    }
    log_threshold = torch.linspace(-3, 0, s)
    if jump:  # one module under two names
        found["activation.log_threshold"] = log_threshold
        found["dead_activations.log_threshold"] = log_threshold
    left_out = {"decoder"} if tied else set()
    return {name: value for name, value in found.items() if name not in left_out}


def wrapper(weights: dict[str, Any]) -> dict[str, Any]:
    """As train.py saves it: the norm is a NumPy number."""
    return {
        "model": weights,
        "mean_center": numbers(D, seed=5),
        "scaling_factor": FACTOR,
        "target_norm": np.sqrt(D),
    }


def activate(name: str, k: int, pre: np.ndarray) -> np.ndarray:
    if "abs" in name:
        pre = np.abs(pre)
    kept = pre * top(pre, k) if "TopK" in name else pre
    return relu(kept) if name.endswith("ReLU") else kept


def _case(
    label: str,
    name: str,
    *,
    file: str,
    s: int = S,
    k: int = 12,
    normalize: bool = False,
    cap: float = 0.0,
    tied: bool = False,
    bare: bool = False,
    semantics: Mapping[str, Any] | None = None,
) -> Case:
    weights = state(s, tied=tied, jump=name == "JumpReLU")

    def write(folder: Path) -> Path:
        torch.save(weights if bare else wrapper(weights), folder / file)
        return folder / file

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        E, e, b, m = as64(
            weights["encoder"], weights["latent_bias"], weights["pre_bias"], numbers(D, seed=5)
        )
        W = E.T if tied else as64(weights["decoder"])[0]
        u = (x - m) * FACTOR
        mean, std = 0.0, 1.0
        if normalize:
            u, mean, std = layer_norm(u)
        z = activate(name, k, (u - b) @ E + e)
        if name == "JumpReLU":
            z = z * (z > np.exp(as64(weights["activation.log_threshold"])[0]))
        if cap:
            z = cap * np.tanh(z / cap)
        return z, ((z @ W + b) * std + mean) / FACTOR + m

    return Case(f"msae/{label}", "msae", write, forward, semantics or {})


def _name(s: int, activation: str, tied: bool = False, normalize: bool = False, cap: float = 0.0):
    return f"{s}_{D}_{activation}_{tied}_{normalize}_{cap}_cc3m_ViT-L~14_train_image_100_{D}.pth"


ALL = {"activation": "TopKReLU", "k": 12, "row_norm": "none", "soft_cap": 0}
CASES = [
    _case("relu", "ReLU", file=_name(S, "ReLU_03")),
    _case("relu-square", "ReLU", s=D, file=_name(D, "ReLU_003")),
    _case("topk-relu", "TopKReLU", file=_name(S, "TopKReLU_12")),
    _case("topk-signed", "TopK", file=_name(S, "TopK_12")),
    _case("topk-abs", "TopKabs", k=6, file=_name(S, "TopKabs_6")),
    _case("topk-abs-relu", "TopKabsReLU", k=6, file=_name(S, "TopKabsReLU_6")),
    _case("jumprelu", "JumpReLU", file=_name(S, f"JumpReLU_{S}")),
    _case("soft-cap", "TopKReLU", cap=2.0, file=_name(S, "TopKReLU_12", cap=2.0)),
    _case("layer-norm", "TopKReLU", normalize=True, file=_name(S, "TopKReLU_12", normalize=True)),
    _case("tied", "TopKReLU", tied=True, file=_name(S, "TopKReLU_12", tied=True)),
    _case("tied-square", "ReLU", s=D, tied=True, file=_name(D, "ReLU_03", tied=True)),
    _case("matryoshka-uw", "TopKReLU", file=_name(S, "TopKReLU_4_UW"), semantics={"k": 12}),
    _case("renamed", "TopKReLU", file="best.pth", semantics=ALL),
    _case(
        "bare",
        "TopKReLU",
        bare=True,
        file="state.pt",
        semantics={**ALL, "input_mean": numbers(D, seed=5).tolist(), "input_std": 1 / FACTOR},
    ),
]
