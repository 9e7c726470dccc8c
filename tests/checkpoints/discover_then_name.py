"""Discover-then-Name: sparse_autoencoder_final.pt with its component axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Case, D, S, as64, numbers, relu, rows


def state(s: int = S) -> dict[str, Any]:
    bias = numbers(1, D, seed=4)
    return {
        "tied_bias": bias,
        "pre_encoder_bias._bias_reference": bias,
        "encoder._weight": numbers(1, s, D, seed=2),
        "encoder._bias": numbers(1, s, seed=3),
        "decoder._weight": rows(s, unit=True).T[None].contiguous(),
        "post_decoder_bias._bias_reference": bias,
    }


def _case(s: int) -> Case:
    weights = state(s)

    def write(folder: Path) -> Path:
        torch.save(weights, folder / "sparse_autoencoder_final.pt")
        return folder / "sparse_autoencoder_final.pt"

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        names = ("encoder._weight", "encoder._bias", "decoder._weight", "tied_bias")
        E, e, W, b = (tensor[0] for tensor in as64(*(weights[name] for name in names)))
        z = relu((x - b) @ E.T + e)
        return z, z @ W.T + b

    return Case(f"discover-then-name/{s}", "discover-then-name", write, forward)


CASES = [_case(S), _case(D)]
