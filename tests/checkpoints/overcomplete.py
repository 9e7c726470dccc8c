"""overcomplete: `torch.save(sae.state_dict(), path)`, and the same tensors as safetensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.checkpoints import Case, D, S, as64, numbers, relu, rows, top

State = dict[str, torch.Tensor]
Encode = Callable[[np.ndarray], np.ndarray]


# --- what the library writes --------------------------------------------------------------------


def linear(prefix: str, h: int, i: int, seed: int) -> State:
    return {
        f"{prefix}.0.weight": numbers(h, i, seed=seed) / i**0.5,
        f"{prefix}.0.bias": numbers(h, seed=seed + 1),
    }


def batch_norm(prefix: str, h: int, seed: int) -> State:
    """Statistics that are far from those of a new layer."""
    return {
        f"{prefix}.1.weight": numbers(h, seed=seed).abs() + 0.5,
        f"{prefix}.1.bias": numbers(h, seed=seed + 1),
        f"{prefix}.1.running_mean": numbers(h, seed=seed + 2),
        f"{prefix}.1.running_var": numbers(h, seed=seed + 3).square() + 0.1,
        f"{prefix}.1.num_batches_tracked": torch.tensor(1200),
    }


def layer_norm(prefix: str, h: int, seed: int) -> State:
    return {
        f"{prefix}.1.weight": numbers(h, seed=seed).abs() + 0.5,
        f"{prefix}.1.bias": numbers(h, seed=seed + 1),
    }


def mlp(s: int = S, norm: str = "", hidden: tuple[int, ...] = ()) -> State:
    """The encoders `linear` (no norm) and `mlp_{bn,ln}_{1,3}`, of a width `hidden`."""
    norms = {"bn": batch_norm, "ln": layer_norm}
    found: State = {}
    names = [*(f"encoder.mlp_blocks.{i}" for i in range(len(hidden))), "encoder.final_block"]
    for at, (name, h, i) in enumerate(zip(names, (*hidden, s), (D, *hidden), strict=True)):
        found |= linear(name, h, i, 20 + 10 * at)
        found |= norms[norm](name, h, 50 + 10 * at) if norm else {}
    return found


def dictionary(W_sd: torch.Tensor, multiplier: float | None = 0.0) -> State:
    found = {"dictionary._weights": W_sd}
    return found if multiplier is None else {**found, "dictionary.multiplier": scalar(multiplier)}


def archetypal(s: int = S, *, written_back: bool) -> State:
    """Points, shares of them, and Relax: as used last, or one step of training behind it."""
    W_sm, relax_sd = numbers(s, 11, seed=5), numbers(s, D, seed=6)
    if written_back:
        W_sm = W_sm.relu() / (W_sm.relu().sum(dim=1, keepdim=True) + 1e-8)
    return {
        "dictionary.W": W_sm,
        "dictionary.C": numbers(11, D, seed=7) + 1,
        "dictionary.Relax": relax_sd,
        "dictionary.multiplier": scalar(0.3),
    }


def tied(state: State) -> State:
    """`tied()` hangs the dictionary below the encoder, so that it is saved twice."""
    again = {name.replace("dictionary.", "encoder.tied_to."): w for name, w in state.items()}
    return {**state, **again}


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value)


def write_state(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(OrderedDict(state), folder / "sae.pth")
    return folder / "sae.pth"


# --- its forward pass ---------------------------------------------------------------------------


def normed(state: State, prefix: str, h: np.ndarray) -> np.ndarray:
    held = {
        name.rpartition(".")[2]: as64(value)[0]
        for name, value in state.items()
        if name.startswith(f"{prefix}.1.")
    }
    if not held:
        return h
    if "running_mean" in held:
        mean, var = held["running_mean"], held["running_var"]
    else:
        mean, var = h.mean(axis=1, keepdims=True), h.var(axis=1, keepdims=True)
    return (h - mean) / np.sqrt(var + 1e-5) * held["weight"] + held["bias"]


def pre_of(state: State, D_sd: np.ndarray, x: np.ndarray, *, residual: bool = False) -> np.ndarray:
    if "encoder.final_block.0.weight" not in state:
        weight = as64(state["encoder.weight"])[0] if "encoder.weight" in state else D_sd
        bias = as64(state["encoder.bias"])[0] if "encoder.bias" in state else 0
        return x @ weight.T + bias
    blocks = sorted({name[:20] for name in state if name.startswith("encoder.mlp_blocks.")})
    for block in [*blocks, "encoder.final_block"]:
        A, a = as64(state[f"{block}.0.weight"], state[f"{block}.0.bias"])
        h = normed(state, block, x @ A.T + a)
        if block != "encoder.final_block":
            h = relu(h) + (x if residual and h.shape == x.shape else 0)
        x = h
    return x


def dictionary64(state: State, mode: str = "l2", delta: float = np.inf) -> np.ndarray:
    scale = np.exp(as64(state.get("dictionary.multiplier", scalar(0.0)))[0])
    if "dictionary._weights" in state:
        (W,) = as64(state["dictionary._weights"])
        power = 1 if mode.endswith("l1") else 2
        lengths = np.linalg.norm(W, ord=power, axis=1, keepdims=True)
        if mode == "identity":
            return W * scale
        return W / (lengths.max() if mode.startswith("max") else lengths + 1e-8) * scale
    W, C, relax = as64(*(state[f"dictionary.{name}"] for name in ("W", "C", "Relax")))
    shares = relu(W) / (relu(W).sum(axis=1, keepdims=True) + 1e-8)
    lengths = np.linalg.norm(relax, axis=1, keepdims=True)
    return (shares @ C + relax * np.minimum(delta / lengths, 1)) * scale


def pursued(x: np.ndarray, D_sd: np.ndarray, k: int) -> np.ndarray:
    z, left = np.zeros((len(x), len(D_sd))), x.copy()
    each = np.arange(len(x))
    for _ in range(k):
        scores = left @ D_sd.T
        best = scores.argmax(axis=1)
        z[each, best] += scores[each, best]
        left -= scores[each, best][:, None] * D_sd[best]
    return z


def weighed(x: np.ndarray, D_sd: np.ndarray, k: int, max_iter: int) -> np.ndarray:
    """Orthogonal matching pursuit, row by row: atoms [j d], of x, by projected gradient descent."""
    z = np.zeros((len(x), len(D_sd)))
    for x_d, z_s in zip(x, z, strict=True):
        taken: list[int] = []
        for _ in range(k):
            scores = D_sd @ (x_d - z_s @ D_sd)
            scores[taken] = -np.inf
            taken.append(int(scores.argmax()))
            atoms = D_sd[taken]
            for _ in range(max_iter):
                slope = atoms @ (z_s[taken] @ atoms - x_d)
                z_s[taken] = relu(z_s[taken] - slope / np.linalg.norm(atoms @ atoms.T))
    return z


def select(semantics: Mapping[str, Any], state: State, pre: np.ndarray) -> np.ndarray:
    h = relu(pre)
    if "thresholds" in state:
        return h * (h >= np.exp(as64(state["thresholds"])[0]))
    kind = semantics["activation"]
    if kind == "topk":
        return h * top(h, semantics["k"])
    return h * (h >= semantics["threshold"]) if kind == "batchtopk" else h


# --- the cases ----------------------------------------------------------------------------------


def _case(name: str, state: State, *, safetensors: bool = False, **semantics: Any) -> Case:
    def write(folder: Path) -> Path:
        if not safetensors:
            return write_state(folder, state)
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"

    D_sd = dictionary64(state, semantics.get("dictionary_norm", "l2"), semantics.get("delta", 9e9))
    mean = np.asarray(semantics.get("input_mean", 0.0))
    std = semantics.get("input_std", 1.0)

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u = (x - mean) / std
        if semantics.get("activation") == "matching_pursuit":
            z = pursued(u, D_sd, semantics["k"])
        elif semantics.get("activation") == "orthogonal_matching_pursuit":
            z = weighed(u, D_sd, semantics["k"], semantics["max_iter"])
        else:
            pre = pre_of(state, D_sd, u, residual=semantics.get("residual", False))
            z = select(semantics, state, pre)
        return z, z @ D_sd * std + mean

    return Case(f"overcomplete/{name}", "overcomplete", write, forward, semantics=semantics)


TOPK: dict[str, Any] = {"activation": "topk", "k": 12}  # beyond what is positive in some rows
UNIT, FREE = dictionary(rows(unit=True)), dictionary(rows())
LOG = torch.linspace(-3, 0, S)

CASES = [
    _case("relu", {**mlp(), **UNIT}, activation="relu"),
    _case("topk", {**mlp(), **UNIT}, **TOPK),
    _case("topk-square", {**mlp(D), **dictionary(rows(D, unit=True))}, activation="topk", k=6),
    _case("safetensors", {**mlp(), **UNIT}, safetensors=True, **TOPK),
    _case("batchtopk", {**mlp(norm="bn"), **UNIT}, activation="batchtopk", threshold=0.7, k=4),
    _case("jump", {**mlp(), **UNIT, "thresholds": LOG}),
    _case("jump-layer-norm", {**mlp(norm="ln"), **UNIT, "thresholds": LOG}),
    _case("mlp-bn-1", {**mlp(norm="bn"), **UNIT}, **TOPK),
    _case("mlp-ln-1", {**mlp(norm="ln"), **UNIT}, **TOPK),
    _case("mlp-bn-3", {**mlp(norm="bn", hidden=(D, D)), **UNIT}, residual=False, **TOPK),
    _case("mlp-bn-3-residual", {**mlp(norm="bn", hidden=(D, D)), **UNIT}, residual=True, **TOPK),
    _case("mlp-ln-3-narrow", {**mlp(norm="ln", hidden=(5, 5)), **UNIT}, residual=True, **TOPK),
    _case("mlp-ln-2-narrow", {**mlp(norm="ln", hidden=(5,)), **UNIT}, **TOPK),
    _case("untied", {"encoder.weight": numbers(S, D, seed=3), **UNIT}, **TOPK),
    _case(
        "untied-square",
        {
            "encoder.weight": numbers(D, D, seed=3),
            "encoder.bias": numbers(D, seed=4),
            **dictionary(rows(D, unit=True)),
        },
        activation="relu",
    ),
    _case("tied", tied(dictionary(rows(unit=True), 0.5)), **TOPK),
    _case("tied-bias", {"encoder.bias": numbers(S, seed=4), **tied(UNIT)}, activation="relu"),
    _case("tied-once", {"encoder.bias": numbers(S, seed=4), **UNIT}, activation="relu"),
    _case("tied-archetypal", tied(archetypal(written_back=True)), **TOPK),
    *(
        _case(f"rows-{mode}", {**mlp(), **FREE}, dictionary_norm=mode, **TOPK)
        for mode in ("l2", "max_l2", "l1", "max_l1", "identity")
    ),
    _case("multiplier", {**mlp(), **dictionary(rows(), -0.7)}, dictionary_norm="l2", **TOPK),
    _case(
        "before-multipliers", {**mlp(), **dictionary(rows(), None)}, dictionary_norm="l1", **TOPK
    ),
    _case("archetypal", {**mlp(), **archetypal(written_back=True)}, **TOPK),
    _case("archetypal-stepped", {**mlp(), **archetypal(written_back=False)}, delta=1.5, **TOPK),
    _case("archetypal-jump", {**mlp(), **archetypal(written_back=True), "thresholds": LOG}),
    _case("pursuit", UNIT, activation="matching_pursuit", k=4),
    _case("pursuit-square", dictionary(rows(D, unit=True)), activation="matching_pursuit", k=3),
    _case(
        "pursuit-with-an-encoder",
        {**mlp(hidden=(D,)), **dictionary(rows(unit=True), -0.2)},
        activation="matching_pursuit",
        k=4,
    ),
    _case("orthogonal", UNIT, activation="orthogonal_matching_pursuit", k=4, max_iter=10),
    _case(
        "orthogonal-square",
        dictionary(rows(D, unit=True), 0.3),
        activation="orthogonal_matching_pursuit",
        k=5,
        max_iter=3,
    ),
    _case("scaled", {**mlp(), **UNIT}, input_mean=[0.5] * D, input_std=2.0, **TOPK),
]
