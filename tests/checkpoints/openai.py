"""OpenAI's sparse_autoencoder: a state dict with the name and state of its activation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Case, D, Forward, S, as64, layer_norm, numbers, relu, rows, top


def class_state(s: int, activation: str, k: int, *, tied: bool = False) -> dict[str, Any]:
    """What the class's own `state_dict` gives: OpenAI's saved again, and MonoLoss's."""
    encoder = numbers(s, D, seed=2)
    topk = {"k": k, "postact_fn": "ReLU"} if activation == "TopK" else {}
    decoder = {"decoder.weight": rows(s).T.contiguous()}
    if tied:  # one tensor under two names
        decoder = {"decoder.linear.weight": encoder}
    return {
        "pre_bias": numbers(D, seed=4),
        "latent_bias": numbers(s, seed=3),
        "stats_last_nonzero": torch.zeros(s, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(s),
        "latents_mean_square": torch.zeros(s),
        "encoder.weight": encoder,
        **{f"activation.{name}": value for name, value in topk.items()},
        **decoder,
        "activation": activation,
        "activation_state_dict": topk,
    }


def class_forward(state: dict[str, Any], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(z, û) of what the class reads behind its layer norm."""
    E, e, b = as64(state["encoder.weight"], state["latent_bias"], state["pre_bias"])
    W = E if "decoder.weight" not in state else as64(state["decoder.weight"])[0].T
    pre = (x - b) @ E.T + e
    if state["activation"] == "TopK":
        z = relu(pre) * top(pre, state["activation_state_dict"]["k"])
    else:
        z = relu(pre)
    return z, z @ W + b


def normed(forward: Forward) -> Forward:
    """The same with a layer norm around it."""

    def around(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, mean, std = layer_norm(x)
        z, u_hat = forward(u)
        return z, u_hat * std + mean

    return around


def original(state: dict[str, Any]) -> dict[str, Any]:
    """As the published files are: without what the class adds when it saves."""
    return {name: value for name, value in state.items() if not name.startswith("activation.")}


def _case(name: str, state: dict[str, Any], stated: str | None = None) -> Case:
    def write(folder: Path) -> Path:
        torch.save(state, folder / "autoencoder.pt")
        return folder / "autoencoder.pt"

    def plain(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return class_forward(state, x)

    forward = normed(plain) if state["activation"] == "TopK" else plain
    return Case(f"openai/{name}", "openai", write, forward, stated=stated)


# k is so large that some of the k largest are negative: a missing ReLU shows.
CASES = [
    _case("topk", original(class_state(S, "TopK", 12))),
    _case("topk-square", original(class_state(D, "TopK", 6))),
    _case("topk-saved-again", class_state(S, "TopK", 12), stated="openai"),
    _case("relu", class_state(S, "ReLU", 0)),
    _case("relu-tied-square", class_state(D, "ReLU", 0, tied=True)),
]
