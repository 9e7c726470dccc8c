"""MonoLoss: autoencoder_final.pt of each of its four models, and their state dicts alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Case, D, Forward, S, as64, layer_norm, numbers, relu, rows
from tests.checkpoints.openai import class_forward, class_state

THETA = 0.375


def config(kind: str, *, normalize: bool) -> dict[str, Any]:
    """What `vars(TrainingConfig)` is."""
    common = {"train_path": "/data/imagenet_lmdb", "n_latents": S, "d_model": D, "topk_k": 12}
    common |= {"normalize": normalize, "mono_coef": 0.03, "auxk_k": None, "device": "cuda"}
    if kind == "topk":
        return {**common, "activation": "topk", "tied_weights": True}
    return {**common, "model_type": kind, "l1_coef": 1e-4, "bandwidth": 1e-3}


def state(kind: str, s: int = S, *, tied: bool = True) -> dict[str, Any]:
    if kind == "topk":
        return class_state(s, "TopK", 12 if s > D else 6, tied=tied)
    found = {
        "b_dec": 0.3 * numbers(D, seed=4),
        "b_enc": numbers(s, seed=3),
        "W_enc": numbers(D, s, seed=2),
        "W_dec": rows(s),
    }
    log = torch.linspace(-3, 0, s)
    return {**found, "jumprelu.log_threshold": log} if kind == "jumprelu" else found


def wrapper(kind: str, weights: dict[str, Any], *, normalize: bool) -> dict[str, Any]:
    return {
        "epoch": 50,
        "step": 1000,
        "model_state_dict": weights,
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]},
        "config": config(kind, normalize=normalize),
    }


def _forward(kind: str, weights: dict[str, Any], *, normalize: bool) -> Forward:
    def inner(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if kind == "topk":
            return class_forward(weights, u)
        E, e, W, b = as64(*(weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")))
        pre = (u if kind == "jumprelu" else u - b) @ E + (0 if kind == "batch_topk" else e)
        z = relu(pre)
        if kind == "jumprelu":
            z = z * (z > np.exp(as64(weights["jumprelu.log_threshold"])[0]))
        if kind == "batch_topk":
            z = z * (z > THETA)
        return z, z @ W + b

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        length = np.linalg.norm(x, axis=1, keepdims=True)
        u = x / length
        mean, std = 0.0, 1.0
        if normalize:
            u, mean, std = layer_norm(u)
        z, u_hat = inner(u)
        return z, (u_hat * std + mean) * length

    return forward


def _case(
    kind: str,
    s: int = S,
    *,
    normalize: bool = False,
    bare: bool = False,
    beside: bool = False,
    tied: bool = True,
    stated: str | None = None,
    semantics: Mapping[str, Any] | None = None,
) -> Case:
    weights = state(kind, s, tied=tied)

    def write(folder: Path) -> Path:
        path = folder / "autoencoder_final.pt"
        torch.save(weights if bare else wrapper(kind, weights, normalize=normalize), path)
        if beside:
            text = json.dumps(config(kind, normalize=normalize))
            (folder / "training_config.json").write_text(text)
        return path

    words = [kind, str(s), *(["bare"] if bare else []), *(["beside"] if beside else [])]
    words += [*(["normalize"] if normalize else []), *([] if tied else ["untied"])]
    return Case(
        f"monoloss/{'-'.join(words)}",
        "monoloss",
        write,
        _forward(kind, weights, normalize=normalize),
        semantics or {},
        stated,
    )


CASES = [
    _case("topk", normalize=True),
    _case("topk", D, normalize=True, tied=False),
    _case("topk"),
    _case(
        "topk", bare=True, normalize=True, stated="monoloss", semantics={"row_norm": "layer_norm"}
    ),
    _case("topk", bare=True, beside=True, normalize=True),
    _case("vanilla"),
    _case("vanilla", D),
    _case("vanilla", normalize=True),
    _case(
        "vanilla",
        bare=True,
        stated="monoloss",
        semantics={"activation": "vanilla", "row_norm": "none"},
    ),
    _case("jumprelu"),
    _case("jumprelu", D, normalize=True),
    _case("jumprelu", bare=True, semantics={"row_norm": "none"}),
    _case("batch_topk", semantics={"threshold": THETA}),
]
