"""saev: one line of JSON, in every form it had, then `torch.save` of the state dict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Case, D, S, as64, numbers, relu, rows, top

FIRST = {  # a header of February 2025
    "d_vit": D,
    "exp_factor": 2,
    "sparsity_coeff": 0.0004,
    "n_reinit_samples": 524288,
    "ghost_grads": False,
    "remove_parallel_grads": True,
    "normalize_w_dec": True,
    "seed": 42,
}
OLD = {name: FIRST[name] for name in FIRST if name not in ("sparsity_coeff", "ghost_grads")}
NEW = {
    "d_model": D,
    "d_sae": S,
    "reinit_blend": 0.8,
    "reinit_enc_dec_tranpose": True,
    "remove_parallel_grads": True,
    "normalize_w_dec": True,
}
L1 = {"cls": "L1Sparsity", "params": {"key": "l1-sparsity", "coeff": 0.0004}}
AUX = {"cls": "AuxK", "params": {"key": "auxk", "k_aux": 512, "alpha": 0.03125}}
NONE = {"cls": "NoSparsity", "params": {"key": "no-sparsity"}}
MEAN = [0.5, -0.25, 1.0, 0.0, 0.75, 2.0, -1.0, 0.125]


def activation(name: str, **params: Any) -> dict[str, Any]:
    return {"cls": name, "params": params}


def line(schema: int, config: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"schema": schema, "cfg": config, "commit": "unknown", "lib": "0.0.0", **more}


def state(s: int = S, *, stored: float | None = None) -> dict[str, torch.Tensor]:
    """The state dict; `stored`: the threshold of a BatchTopK."""
    found = {
        "W_dec": rows(s, unit=True),
        "b_dec": numbers(D, seed=4),
        "W_enc": numbers(D, s, seed=2),
        "b_enc": numbers(s, seed=3),
    }
    if stored is not None:
        # The first latent is at the threshold in every row, and so never active.
        found["W_enc"][:, 0], found["b_enc"][0] = 0, max(stored, 0.0)
        found["activation.threshold"] = torch.tensor(stored)
    return found


def write(folder: Path, header: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    path = folder / "sae.pt"
    with path.open("wb") as file:
        file.write((json.dumps(header) + "\n").encode())
        torch.save(weights, file)
    return path


def signed_top(k: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pre: pre * top(pre, k)


def above(theta: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pre: np.where(pre > theta, pre, 0.0)


def _case(
    name: str,
    header: dict[str, Any],
    act: Callable[[np.ndarray], np.ndarray] = relu,
    *,
    subtracts: bool = False,
    s: int = S,
    stored: float | None = None,
    mean: np.ndarray | float = 0.0,
    std: float = 1.0,
    **said: Any,
) -> Case:
    weights = state(s, stored=stored)

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        E, e, W, b = as64(*(weights[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")))
        u = (x - mean) / std
        z = act((u - b if subtracts else u) @ E + e)
        return z, (z @ W + b) * std + mean

    return Case(
        f"saev/{name}", "saev", lambda folder: write(folder, header, weights), forward, said
    )


def form_b(commit: str, kind: dict[str, Any]) -> dict[str, Any]:
    config = {**OLD, "activation": kind}
    return line(1, config, cls="SparseAutoencoderConfig", commit=commit)


def nested(kind: dict[str, Any], **config: Any) -> dict[str, Any]:
    return line(5, {**NEW, "activation": kind, **config}, commit="3d73f1f")


TOP_K = activation("TopK", top_k=10)  # the tenth of 16 is negative in some rows
BATCH = activation("BatchTopK", top_k=4)

CASES = [
    _case("first", FIRST, subtracts=True, input="raw"),
    _case("first-square", {**FIRST, "exp_factor": 1}, subtracts=True, s=D, input="raw"),
    _case(
        *("first-scaled", FIRST),
        subtracts=True,
        mean=np.array(MEAN),
        std=2.0,
        input_mean=MEAN,
        input_std=2.0,
    ),
    _case("1a-relu", line(1, OLD, cls="Relu", commit="5951e84"), subtracts=True, input="raw"),
    _case("1a-relu-after", line(1, OLD, cls="Relu", commit="e7ca004")),
    _case(
        *("1a-topk", line(1, {**OLD, "top_k": 10}, cls="TopK", commit="5951e84"), signed_top(10)),
        subtracts=True,
        input="raw",
    ),
    _case(
        *("1b-before", form_b("aa5c1ce", TOP_K), signed_top(10)),
        subtracts=True,
        input="raw",
        pre_bias=True,
    ),
    _case("1a-unknown", line(1, OLD, cls="Relu"), input="raw", pre_bias=False),
    _case("1b-unknown", form_b("unknown", activation("Relu")), input="raw", pre_bias=False),
    _case("1b-after", form_b("f5d892cb", activation("Relu"))),
    _case("2-topk", line(2, {**OLD, "activation": TOP_K}), signed_top(10)),
    _case(
        *("2-batchtopk", line(2, {**OLD, "activation": BATCH}), above(0.5)),
        activation="batchtopk",
        threshold=0.5,
    ),
    _case("3-batchtopk-by-row", line(3, {**OLD, "activation": BATCH}), signed_top(4)),
    _case("3-d-model", line(3, {"d_model": D, "exp_factor": 2, "activation": activation("Relu")})),
    _case(
        "4-relu",
        line(
            4, {"d_model": D, "d_sae": S, "seed": 0, "activation": activation("Relu", kind="relu")}
        ),
    ),
    _case("4-batchtopk", line(4, {**NEW, "activation": BATCH}), above(0.5), stored=0.5),
    _case(
        *("5-batchtopk", nested(activation("BatchTopK", top_k=4, momentum=0.1, sparsity=NONE))),
        above(0.25),
        stored=0.25,
    ),
    _case(
        *("5-batchtopk-below-zero", nested(activation("BatchTopK", key="batch-top-k", aux=AUX))),
        stored=-1.0,
    ),
    _case("5-relu", nested(activation("Relu", key="relu", sparsity=L1, aux=NONE))),
    _case(
        *("5-topk-square", nested(activation("TopK", key="top-k", top_k=6, aux=AUX), d_sae=D)),
        signed_top(6),
        s=D,
    ),
    _case(
        *("5-topk-beyond", nested(activation("TopK", kind="top-k", top_k=32))),
        signed_top(32),
    ),
]
