"""SAELens: sae_weights.safetensors and cfg.json, of version 6 and of the versions before it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.checkpoints import Case, D, S, as64, layer_norm, numbers, relu, rows, top

K, SCALE, OUT = 6, 0.37, 12
Tensors = dict[str, torch.Tensor]
METADATA = {
    "sae_lens_version": "6.54.12",
    "sae_lens_training_version": "6.54.12",
    "model_name": "org/a-model",
    "hook_name": "blocks.10.hook_resid_post",
    "hook_head_index": None,
    "dataset_path": "org/images",
    "prepend_bos": False,
}


def config_of(architecture: str, s: int = S, **changes: Any) -> dict[str, Any]:
    """As version 6 writes it; None removes a key."""
    config = {
        "d_in": D,
        "d_sae": s,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": "transcoder" not in architecture,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": METADATA,
        "architecture": architecture,
    }
    if "topk" in architecture:
        config |= {"k": K, "rescale_acts_by_decoder_norm": False}
    if architecture.startswith("matryoshka"):
        config["matryoshka_widths"] = [s // 4, s // 2, s]
    if "transcoder" in architecture:
        config["d_out"] = OUT
    return {k: v for k, v in {**config, **changes}.items() if v is not None}


def old_config(**changes: Any) -> dict[str, Any]:
    """As version 3 wrote it, and the first ones that had no architecture (None removes a key)."""
    config = {
        "architecture": "standard",
        "d_in": D,
        "d_sae": S,
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "context_size": 1,
        "model_name": "org/a-model",
        "hook_name": "blocks.10.hook_resid_post",
        "hook_layer": 10,
        "hook_head_index": None,
        "dataset_path": "org/images",
        "normalize_activations": "none",
        "dtype": "torch.float32",
        "device": "cpu",
        "sae_lens_training_version": "3.1.0",
    }
    return {k: v for k, v in {**config, **changes}.items() if v is not None}


def tensors_of(architecture: str, s: int = S) -> Tensors:
    d_out = OUT if "transcoder" in architecture else D
    found = {
        "W_enc": numbers(D, s, seed=2),
        "W_dec": rows(s, d_out),
        "b_dec": numbers(d_out, seed=4),
        "b_enc": numbers(s, seed=3),
    }
    if architecture == "gated":
        del found["b_enc"]
        found |= {"b_gate": numbers(s, seed=6), "b_mag": numbers(s, seed=7)}
        found["r_mag"] = 0.3 * numbers(s, seed=5)
    if "jumprelu" in architecture:
        found["threshold"] = torch.linspace(-0.5, 2, s)
    if "batchtopk" in architecture:
        found["topk_threshold"] = torch.tensor(1.25, dtype=torch.float64)
    if "skip" in architecture:
        found["W_skip"] = numbers(d_out, D, seed=8)
    return found


def whitening() -> Tensors:
    """float64, as SAELens estimates it."""
    matrix = torch.eye(D).double() + 0.3 * numbers(D, D, seed=9).double()
    return {
        "mean": numbers(D, seed=10).double() + 1,
        "matrix": matrix,
        "inverse_matrix": torch.linalg.inv(matrix).contiguous(),
    }


def write(
    folder: Path, tensors: Tensors, config: Mapping[str, Any], scale: float | None = None
) -> Path:
    """With the files that a run keeps beside its checkpoint, where they decide anything."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.full((S,), -3.0)}, folder / "sparsity.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    whitens = config.get("normalize_activations") == "covariance_whitening"
    if whitens or scale is not None:
        scaler = {"scaling_factor": scale, "has_whitening": whitens}
        (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    if whitens:
        save_file(whitening(), folder / "activation_whitening.safetensors")
    return folder / "sae_weights.safetensors"


def forward_of(
    architecture: str, tensors: Tensors, config: Mapping[str, Any], x: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    t = dict(zip(tensors, as64(*tensors.values()), strict=True))
    transcoder = "transcoder" in architecture
    norm = config.get("normalize_activations", "none")
    w = dict(zip(whitening(), as64(*whitening().values()), strict=True))
    u, mean, std = x, 0.0, 1.0
    if norm == "layer_norm":
        u, mean, std = layer_norm(x)
    elif norm == "constant_norm_rescale":
        std = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D)
        u = x / std
    elif norm in ("expected_average_only_in", True):
        u, std = x * scale, 1 / scale
    elif norm == "covariance_whitening":
        u = (x - w["mean"]) @ w["matrix"]
    if not transcoder and config.get("apply_b_dec_to_input", True):
        u = u - t["b_dec"]
    rho = np.linalg.norm(t["W_dec"], axis=1)
    if not config.get("rescale_acts_by_decoder_norm"):
        rho = np.ones_like(rho)
    pre = (u @ t["W_enc"] + t.get("b_enc", 0)) * rho
    if architecture == "topk":
        z = relu(pre) * top(pre, K)
    elif architecture == "abstopk":
        z = pre * top(np.abs(pre), K)
    elif "jumprelu" in architecture:
        z = relu(pre) * (pre > t["threshold"])
    elif "batchtopk" in architecture:
        z = relu(pre) * (pre > t["topk_threshold"])
    elif architecture == "gated":
        z = (pre + t["b_gate"] > 0) * relu(pre * np.exp(t["r_mag"]) + t["b_mag"])
    else:
        z = relu(pre)
    if config.get("activation_fn_str") == "tanh-relu":
        z = np.tanh(z)
    y = (z * t.get("scaling_factor", 1) / rho) @ t["W_dec"] + t["b_dec"]
    if transcoder:
        return z, y + (x @ t["W_skip"].T if "skip" in architecture else 0)
    if norm == "covariance_whitening":
        return z, y @ w["inverse_matrix"] + w["mean"]
    return z, y * std + mean


def _case(
    name: str,
    architecture: str,
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    stored: Tensors | None = None,
    scale: float | None = None,
    **more: Any,
) -> Case:
    said = more.get("semantics", {}).get("input_std")
    s = scale or (1 / said if said else 1.0)
    return Case(
        f"saelens/{name}",
        "saelens",
        lambda folder: write(folder, stored or tensors, config, scale),
        lambda x: forward_of(architecture, tensors, config, x, s),
        transcoder="transcoder" in architecture,
        **more,
    )


def _v6(
    architecture: str, name: str = "", *, s: int = S, scale: Any = None, **changes: Any
) -> Case:
    more = {"semantics": changes.pop("semantics")} if "semantics" in changes else {}
    config = config_of(architecture, s, **changes)
    tensors = tensors_of(architecture, s)
    return _case(name or architecture, architecture, config, tensors, scale=scale, **more)


def _old(name: str, what: str = "standard", /, **changes: Any) -> Case:
    more = {key: changes.pop(key) for key in ("stored", "semantics") if key in changes}
    tensors = changes.pop("tensors", None) or tensors_of(what)
    return _case(f"before-6-{name}", what, old_config(**changes), tensors, **more)


ARCHITECTURES = (
    "standard",
    "topk",
    "abstopk",
    "jumprelu",
    "gated",
    "batchtopk",
    "matryoshka_batchtopk",
)
TRANSCODERS = (
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
_LOGARITHMS = {**tensors_of("jumprelu"), "threshold": torch.linspace(-3, 1, S).exp()}
_SCALED = {**tensors_of("standard"), "scaling_factor": torch.linspace(0.5, 2, S)}
_ONES = {**tensors_of("standard"), "scaling_factor": torch.ones(S)}

CASES = [
    *(_v6(architecture) for architecture in (*ARCHITECTURES, *TRANSCODERS)),
    *(_v6(architecture, f"square-{architecture}", s=D) for architecture in ARCHITECTURES),
    *(
        _v6(a, f"{a}-{norm}", normalize_activations=norm)
        for a in ("standard", "topk", "gated", "jumprelu_skip_transcoder")
        for norm in ("layer_norm", "constant_norm_rescale")
    ),
    *(
        _v6(a, f"{a}-{norm}-without-b_dec", normalize_activations=norm, apply_b_dec_to_input=False)
        for a in ("standard", "gated")
        for norm in ("none", "layer_norm", "covariance_whitening")
    ),
    *(
        _v6(a, f"{a}-rescaled", rescale_acts_by_decoder_norm=True)
        for a in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
    ),
    *(
        _v6(a, f"{a}-scaled", normalize_activations="expected_average_only_in", scale=SCALE)
        for a in ("standard", "topk", "jumprelu")
    ),
    _v6(
        "standard",
        "scale-said",
        normalize_activations="expected_average_only_in",
        semantics={"input_std": 1 / SCALE},
    ),
    *(
        _v6(a, f"{a}-whitened", normalize_activations="covariance_whitening")
        for a in ("standard", "jumprelu", "gated")
    ),
    _v6(
        "topk",
        "topk-rescaled-whitened",
        normalize_activations="covariance_whitening",
        rescale_acts_by_decoder_norm=True,
    ),
    _old("standard"),
    _old("first", architecture=None, apply_b_dec_to_input=None, normalize_activations=None),
    _old("bare", **dict.fromkeys(old_config(), None) | {"d_in": D, "d_sae": S, "hook_point": "h"}),
    _old("not-applied", apply_b_dec_to_input=False),
    _old("topk-called-standard", "topk", **TOPK),
    _old("normalised-false", normalize_activations=False),
    _old("normalised-true", normalize_activations=True, semantics={"input_std": 2.5}),
    _old("layer_norm", normalize_activations="layer_norm"),
    _old("tanh", activation_fn_str="tanh-relu"),
    _old(
        "jumprelu-logarithms",
        "jumprelu",
        architecture="jumprelu",
        tensors=_LOGARITHMS,
        stored={
            **{k: v for k, v in _LOGARITHMS.items() if k != "threshold"},
            "log_threshold": _LOGARITHMS["threshold"].log(),
        },
    ),
    _old("gated", "gated", architecture="gated"),
    _old("ones", tensors=_ONES),
    _old("finetuned", tensors=_SCALED, finetuning_scaling_factor=True),
]
