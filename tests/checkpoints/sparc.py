"""SPARC: msae_checkpoint.pth of several streams, with and without its run_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Case, D, S, as64, numbers, relu, rows, top

WIDTHS = {"clip_img": D, "clip_txt": 6, "dino": 10}


def state(widths: Mapping[str, int], s: int = S) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, (stream, d) in enumerate(widths.items()):
        found |= {
            f"encoders.{stream}.weight": numbers(s, d, seed=20 + i),
            f"decoders.{stream}.weight": rows(s, d, seed=30 + i).T.contiguous(),
            f"pre_biases.{stream}": 0.3 * numbers(d, seed=40 + i),
            f"latent_biases.{stream}": numbers(s, seed=50 + i),
            f"stats_last_nonzero_{stream}": torch.zeros(s, dtype=torch.int64),
        }
    return found


def _case(
    label: str,
    widths: Mapping[str, int],
    semantics: Mapping[str, Any],
    *,
    s: int = S,
    k: int = 12,
    run: bool = False,
) -> Case:
    weights = state(widths, s)
    stream = semantics.get("stream", next(iter(widths)))
    target = semantics.get("target", stream)

    def write(folder: Path) -> Path:
        torch.save(weights, folder / "msae_checkpoint.pth")
        if run:
            arguments = {"k": k, "topk_type": "global", "n_latents": s}
            text = json.dumps({"args": arguments, "config_file_content": {}})
            (folder / "run_config.json").write_text(text)
        return folder / "msae_checkpoint.pth"

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        E, e, b = as64(
            weights[f"encoders.{stream}.weight"],
            weights[f"latent_biases.{stream}"],
            weights[f"pre_biases.{stream}"],
        )
        W, b_out = as64(weights[f"decoders.{target}.weight"], weights[f"pre_biases.{target}"])
        length = np.linalg.norm(x, axis=1, keepdims=True)
        pre = (x / length - b) @ E.T + e
        z = relu(pre) * top(pre, k)
        x_hat = z @ W.T + b_out
        return z, x_hat if target != stream else x_hat * length

    return Case(
        f"sparc/{label}",
        "sparc",
        write,
        forward,
        semantics,
        d=widths[stream],
        transcoder=target != stream,
    )


CASES = [
    _case("one-stream", {"dino": D}, {"k": 12}),
    _case("square", {"dino": D}, {"k": 6}, s=D, k=6),
    _case("run-config", {"dino": D}, {}, run=True),
    _case("of-three", WIDTHS, {"stream": "dino", "k": 12}),
    _case("across", WIDTHS, {"stream": "clip_img", "target": "clip_txt", "k": 12}),
]
