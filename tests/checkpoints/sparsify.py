"""sparsify: sae.safetensors and cfg.json, as `SparseCoder.save_to_disk` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from tests.checkpoints import Case, D, S, as64, numbers, relu, rows, top

CONFIG = {
    "activation": "topk",
    "expansion_factor": 2,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": 4,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
}


def tensors(s: int, *, unit: bool, skip: bool) -> dict[str, Any]:
    found = {
        "encoder.weight": numbers(s, D, seed=2),
        "encoder.bias": numbers(s, seed=3),
        "W_dec": rows(s, unit=unit),
        "b_dec": numbers(D, seed=4),
    }
    return {**found, "W_skip": numbers(D, D, seed=5)} if skip else found


def write(folder: Path, config: dict[str, Any], weights: dict[str, Any]) -> Path:
    hookpoint = folder / "layers.10"
    hookpoint.mkdir(parents=True, exist_ok=True)
    save_file(weights, hookpoint / "sae.safetensors")
    (hookpoint / "cfg.json").write_text(json.dumps({**config, "d_in": D}))
    run = {"model": "org/a-model", "dataset": "org/texts", "sae": config}
    (folder / "config.json").write_text(json.dumps(run))
    return hookpoint / "sae.safetensors"


def _case(name: str, s: int = S, **changes: Any) -> Case:
    config: dict[str, Any] = {**CONFIG, "expansion_factor": s // D, **changes}
    weights = tensors(s, unit=config["normalize_decoder"], skip=config["skip_connection"])

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        E, e, W, b = as64(
            *(weights[n] for n in ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
        )
        pre = (x if config["transcode"] else x - b) @ E.T + e
        k = config["k"]
        if config.get("signed"):
            z = pre * top(np.abs(pre), k)
        elif config["activation"] == "groupmax":
            grouped = relu(pre).reshape(len(x), k, -1)
            z = (grouped * (grouped == grouped.max(axis=2, keepdims=True))).reshape(pre.shape)
        else:
            z = relu(pre) * top(relu(pre), k)
        skip = x @ as64(weights["W_skip"])[0].T if config["skip_connection"] else 0
        return z, z @ W + b + skip

    return Case(
        f"sparsify/{name}",
        "sparsify",
        lambda folder: write(folder, config, weights),
        forward,
        transcoder=config["transcode"],
    )


CASES = [
    _case("topk"),
    _case("square", s=D),
    _case("free-decoder", normalize_decoder=False, num_latents=S, expansion_factor=7),
    _case("groupmax", activation="groupmax"),
    _case("signed", signed=True, k=10),  # the tenth of 16 is negative in some rows
    _case("k-beyond-the-positive", k=14),
    _case("transcoder", transcode=True),
    _case("skip-transcoder", transcode=True, skip_connection=True),
    _case("skip-sae", skip_connection=True, normalize_decoder=False),
]
