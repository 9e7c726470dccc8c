"""Three formats of language models: Gemma Scope, Llama Scope, Goodfire."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.checkpoints import Case, D, S, as64, numbers, relu, rows, top

# --- Gemma Scope --------------------------------------------------------------------------------


def gemma(s: int = S) -> dict[str, np.ndarray]:
    found = {
        "W_enc": numbers(D, s, seed=2),
        "W_dec": rows(s),
        "b_enc": numbers(s, seed=3),
        "b_dec": numbers(D, seed=4),
        "threshold": torch.linspace(0.125, 2, s),
    }
    return {name: tensor.numpy() for name, tensor in found.items()}


def _gemma(
    label: str,
    s: int = S,
    *,
    lower: bool = False,
    folder: str = "layer_20/width_16k/average_l0_71",
    semantics: Mapping[str, Any] | None = None,
) -> Case:
    arrays = gemma(s)
    semantics = semantics or {}

    def write(root: Path) -> Path:
        path = root / folder / "params.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        renamed = {n.lower() if lower else n: array for n, array in arrays.items()}
        np.savez(path, **renamed)  # type: ignore[arg-type]
        return path

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        W = {name: array.astype(np.float64) for name, array in arrays.items()}
        std = semantics.get("input_std", 1.0)
        pre = (x / std) @ W["W_enc"] + W["b_enc"]
        z = pre * (pre > W["threshold"])
        return z, (z @ W["W_dec"] + W["b_dec"]) * std

    transcoder = "transcoders" in folder
    return Case(
        f"gemma-scope/{label}", "gemma-scope", write, forward, semantics, transcoder=transcoder
    )


# --- Llama Scope --------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "hook_point_in": "blocks.3.hook_resid_post",
    "hook_point_out": "blocks.3.hook_resid_post",
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "expansion_factor": 2,
    "d_model": D,
    "d_sae": S,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.40625,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 7.5, "out": 7.5},
    "sparsity_include_decoder_norm": True,
    "use_glu_encoder": False,
    "top_k": 12,
    "lp": 1,
    "dtype": "torch.bfloat16",
}


def llama(s: int = S) -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": numbers(s, D, seed=2),
        "encoder.bias": numbers(s, seed=3),
        "decoder.weight": rows(s).T.contiguous(),
        "decoder.bias": numbers(D, seed=4),
    }


def write_llama(root: Path, config: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    path = root / "checkpoints" / "final.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, {"version": "0.1.0"})
    (root / "hyperparams.json").write_text(json.dumps(config, indent=4))
    return path


def _llama(
    label: str, s: int = S, *, semantics: Mapping[str, Any] | None = None, **changes: Any
) -> Case:
    activation = (semantics or {}).get("activation", changes.get("act_fn", LLAMA["act_fn"]))
    config = {**LLAMA, "d_sae": s, **changes}
    weights = llama(s)
    transcoder = config["hook_point_in"] != config["hook_point_out"]

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # In the space that is trained in; then the latents as the project's loader rescales them.
        E, e, W, b = as64(*weights.values())
        f_in = f_out = np.ones((len(x), 1))
        if config["norm_activation"] == "dataset-wise":
            norms = config["dataset_average_activation_norm"]
            f_in, f_out = np.sqrt(D) / norms["in"], np.sqrt(D) / norms["out"]
        elif config["norm_activation"] == "token-wise":
            f_in = f_out = np.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True)
        per_row = isinstance(f_in, np.ndarray)
        gain = np.ones(s) if per_row else np.full(s, 1 / f_in)
        if config["sparsity_include_decoder_norm"]:
            norms_s = np.linalg.norm(W, axis=0)
            gain = gain * norms_s * (1.0 if per_row else f_in / f_out)
        centre = b * f_in / f_out if config["apply_decoder_bias_to_pre_encoder"] else 0.0
        pre = ((x * f_in - centre) @ E.T + e) * gain
        if activation == "relu":
            z = relu(pre)
        elif activation == "topk":
            z = relu(pre) * top(pre, config["top_k"])
        else:
            z = pre * (pre > config["jump_relu_threshold"])
        return z, ((z / gain) @ W.T + b) / f_out

    def write(folder: Path) -> Path:
        return write_llama(folder, config, weights)

    return Case(
        f"llama-scope/{label}",
        "llama-scope",
        write,
        forward,
        semantics or {},
        transcoder=transcoder,
    )


# --- Goodfire -----------------------------------------------------------------------------------


def goodfire(s: int = S) -> dict[str, torch.Tensor]:
    return {
        "encoder_linear.weight": numbers(s, D, seed=2),
        "encoder_linear.bias": numbers(s, seed=3),
        "decoder_linear.weight": rows(s).T.contiguous(),
        "decoder_linear.bias": numbers(D, seed=4),
    }


def _goodfire(s: int) -> Case:
    weights = goodfire(s)

    def write(folder: Path) -> Path:
        torch.save(weights, folder / "SAE-l19.pth")
        return folder / "SAE-l19.pth"

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        E, e, W, b = as64(*weights.values())
        z = relu(x @ E.T + e)
        return z, z @ W.T + b

    return Case(f"goodfire/{s}", "goodfire", write, forward)


CASES = [
    _gemma("upper"),
    _gemma("square", D),
    _gemma("lower", lower=True),
    _gemma("embedding", folder="embedding/width_4k/average_l0_6", semantics={"input_std": 8**0.5}),
    _gemma("transcoder", folder="gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_50"),
    _llama("dataset-wise"),
    _llama("square", D),
    _llama("norms-apart", dataset_average_activation_norm={"in": 7.5, "out": 3.0}),
    _llama("transcoder", hook_point_out="blocks.3.hook_mlp_out"),
    _llama("free-decoder", sparsity_include_decoder_norm=False),
    _llama("bias-before", apply_decoder_bias_to_pre_encoder=True),
    _llama("topk-as-jumprelu", semantics={"activation": "jumprelu"}, act_fn="topk"),
    _llama("topk-with-threshold", semantics={"activation": "topk"}, act_fn="topk"),
    _llama("topk", act_fn="topk", jump_relu_threshold=0.0),
    _llama("relu", act_fn="relu", norm_activation="inference"),
    _llama("token-wise", norm_activation="token-wise", sparsity_include_decoder_norm=False),
    _goodfire(S),
    _goodfire(D),
]
