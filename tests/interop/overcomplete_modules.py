"""Modules of overcomplete, with values that show mistakes, and what has to be said of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.interop.common import WIDTH, Forward, random_rows, randomised

overcomplete = pytest.importorskip("overcomplete.sae")

S, K = 128, 12
POINTS = random_rows(90, seed=11)
CLASSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # its arguments, what is said of it
    "SAE": ({}, {"activation": "relu"}),
    "TopKSAE": ({"top_k": K}, {"activation": "topk", "k": K}),
    "BatchTopKSAE": ({"top_k": K * 200}, {"activation": "batchtopk"}),
    "JumpSAE": ({}, {}),
    "RATopKSAE": ({"points": POINTS, "top_k": K}, {"activation": "topk", "k": K}),
    "RAJumpSAE": ({"points": POINTS}, {}),
    "MpSAE": ({"k": K}, {"activation": "matching_pursuit", "k": K}),
    "OMPSAE": (
        {"k": K, "max_iter": 7},
        {"activation": "orthogonal_matching_pursuit", "k": K, "max_iter": 7},
    ),
}


def made(name: str, s: int = S, **more: Any) -> Any:
    """A module with values that show mistakes, and a dictionary as the next step finds it."""
    sae = getattr(overcomplete, name)(WIDTH, s, **CLASSES[name][0], **more)
    randomised(sae)
    sae.train()
    for seed in range(20):  # running statistics of batch norms, and a running threshold
        sae(random_rows(seed=seed))
    randomised(sae, seed=1)
    return sae


def forward_of(sae: Any) -> Forward:
    sae.eval()

    def forward(x_nd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, z_ns = sae.encode(x_nd)
        return z_ns, sae.decode(z_ns)

    return forward


def said_of(name: str, sae: Any) -> dict[str, Any]:
    threshold = getattr(sae, "running_threshold", None)
    said = CLASSES[name][1]
    return said if threshold is None else {**said, "threshold": float(threshold)}
