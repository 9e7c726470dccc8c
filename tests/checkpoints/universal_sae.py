"""UniversalSAE: a wrapper around the state dict of an overcomplete of before multipliers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Case, D, S, relu, rows, top
from tests.checkpoints.overcomplete import State, dictionary, dictionary64, mlp, pre_of

MEAN, STD = -0.5, 0.002  # so small that 1e-5 beside it shows


def wrapped(state: State) -> dict[str, Any]:
    """What its training saves, with the moments of an optimizer that has made a step."""
    parameters = [
        torch.nn.Parameter(value) for value in state.values() if value.is_floating_point()
    ]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=1e-5)
    return {
        "epoch": 29,
        "model_state_dict": state,
        "optimizer_state_dict": optimizer.state_dict(),
        "learning_rate": 1e-6,
    }


def write(folder: Path, checkpoint: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "uni_DinoV2_checkpoint_29.pth")
    return folder / "uni_DinoV2_checkpoint_29.pth"


def state_of(s: int = S) -> State:
    return {**mlp(s, norm="bn"), **dictionary(rows(s), None)}  # rows that are free in the file


def _case(name: str, s: int, k: int) -> Case:
    state = state_of(s)

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        D_sd = dictionary64(state, "l2")
        h = relu(pre_of(state, D_sd, (x - MEAN) / (STD + 1e-5)))
        z = h * top(h, k)
        return z, z @ D_sd * (STD + 1e-5) + MEAN

    return Case(
        f"universal-sae/{name}",
        "universal_sae",
        lambda folder: write(folder, wrapped(state)),
        forward,
        semantics={"k": k, "input_mean": MEAN, "input_std": STD + 1e-5},
    )


CASES = [_case("topk", S, 12), _case("square", D, 6)]
