"""dictionary_learning: trainer_0/ae.pt and its config.json, as `trainSAE` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Case, D, S, as64, numbers, relu, rows, top

K, THRESHOLD, FACTOR = 7, 0.5, 4.0
Tensors = dict[str, torch.Tensor]


def tensors_of(dict_class: str, s: int = S, threshold: float = THRESHOLD) -> Tensors:
    """The state dict of a class, of decoder rows of length 1 where its trainer keeps them so."""
    E_sd, D_sd = numbers(s, D, seed=2), rows(s, unit=dict_class not in FREE)
    linear = {"encoder.weight": E_sd, "decoder.weight": D_sd.T.contiguous()}
    bare = {"W_enc": E_sd.T.contiguous(), "W_dec": D_sd}
    e_s, b_d = numbers(s, seed=3), numbers(D, seed=4)
    scalars = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    kept = {"b_dec": b_d, **scalars, **linear, "encoder.bias": e_s}
    return {
        "AutoEncoder": {"bias": b_d, **linear, "encoder.bias": e_s},
        "AutoEncoderNew": {**linear, "encoder.bias": e_s, "decoder.bias": b_d},
        "GatedAutoEncoder": {
            **{"decoder_bias": b_d, **linear, "r_mag": 0.3 * numbers(s, seed=5)},
            **{"gate_bias": numbers(s, seed=6), "mag_bias": numbers(s, seed=7)},
        },
        "JumpReluAutoEncoder": {
            **{**bare, "b_enc": e_s, "b_dec": b_d},
            "threshold": torch.linspace(-0.5, 2, s),
        },
        "AutoEncoderTopK": kept,
        "BatchTopKSAE": kept,
        "MatryoshkaBatchTopKSAE": {
            **{**scalars, **bare, "b_enc": e_s, "b_dec": b_d},
            "group_sizes": torch.tensor([s // 4, s // 4, s // 2]),
        },
    }[dict_class]


FREE = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder")
CLASSES = (
    *FREE,
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


def config_of(dict_class: str, **trainer: Any) -> dict[str, Any]:
    sizes = {"activation_dim": D, "dict_size": S, "layer": 10, "lm_name": "org/a-model"}
    said = {"dict_class": dict_class, **sizes, "submodule_name": "resid_post_layer_10", **trainer}
    if "k" in tensors_of(dict_class.replace("Matroyshka", "Matryoshka")):
        said.setdefault("k", K)
    return {"trainer": said, "buffer": {"io": "out", "ctx_len": 128}}


def write(folder: Path, tensors: Mapping[str, Any], config: Any = None, at: str = "ae.pt") -> Path:
    path = folder / "trainer_0" / at
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(tensors), path)
    if config is not None:
        (folder / "trainer_0" / "config.json").write_text(json.dumps(config, indent=4))
    return path


def backup(dict_class: str, factor: float | None = FACTOR) -> dict[str, Any]:
    """What lies at ae.pt while a run goes on."""
    return {
        "step": 1000,
        "ae": tensors_of(dict_class),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]},
        "config": config_of(dict_class)["trainer"],
        "norm_factor": factor,
    }


def forward_of(dict_class: str, tensors: Tensors, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    t = dict(zip(tensors, as64(*tensors.values()), strict=True))
    E, W = (
        (t["encoder.weight"].T, t["decoder.weight"].T)
        if "encoder.weight" in t
        else (t["W_enc"], t["W_dec"])
    )
    e = t.get("encoder.bias", t.get("b_enc", 0.0))
    if dict_class == "AutoEncoder":
        b = t["bias"]
        z = relu((x - b) @ E + e)
    elif dict_class == "AutoEncoderNew":
        b = t["decoder.bias"]
        z = relu(x @ E + e)
    elif dict_class == "GatedAutoEncoder":
        b = t["decoder_bias"]
        u = (x - b) @ E
        z = (u + t["gate_bias"] > 0) * relu(np.exp(t["r_mag"]) * u + t["mag_bias"])
    elif dict_class == "JumpReluAutoEncoder":
        b, pre = t["b_dec"], x @ E + e
        z = relu(pre * (pre > t["threshold"]))
    elif dict_class == "AutoEncoderTopK":
        b = t["b_dec"]
        h = relu((x - b) @ E + e)
        z = h * top(h, K)
    else:
        b = t["b_dec"]
        h = relu((x - b) @ E + e)
        z = h * (h > t["threshold"])
    return z, z @ W + b


def _case(dict_class: str, name: str = "", *, s: int = S, at: str = "ae.pt", **said: Any) -> Case:
    tensors = tensors_of(dict_class, s, said.pop("threshold", THRESHOLD))
    config = None if said.get("semantics") or said.get("stated") else config_of(dict_class)
    if said.pop("misspelt", False):
        config = config_of(dict_class.replace("Matryoshka", "Matroyshka"))
    return Case(
        f"dictionary_learning/{name or dict_class}",
        "dictionary_learning",
        lambda folder: write(folder, tensors, config, at),
        lambda x: forward_of(dict_class, tensors, x),
        **said,
    )


def _backup_case(dict_class: str) -> Case:
    """It sees x / N: its latents, N times as large, are those of the finished file."""

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z, xhat = forward_of(dict_class, tensors_of(dict_class), x / FACTOR)
        return FACTOR * z, FACTOR * xhat

    return Case(
        f"dictionary_learning/backup-{dict_class}",
        "dictionary_learning",
        lambda folder: write(folder, backup(dict_class), config_of(dict_class)),
        forward,
    )


def _transcoder() -> Case:
    tensors = tensors_of("AutoEncoder")
    config = config_of("AutoEncoder")
    config["buffer"]["io"] = "in_and_out"
    return Case(
        "dictionary_learning/transcoder",
        "dictionary_learning",
        lambda folder: write(folder, tensors, config),
        lambda x: forward_of("AutoEncoder", tensors, x),
        transcoder=True,
    )


CASES = [
    *(_case(dict_class) for dict_class in CLASSES),
    *(_case(dict_class, f"square-{dict_class}", s=D) for dict_class in CLASSES),
    *(_backup_case(dict_class) for dict_class in CLASSES),
    _case("BatchTopKSAE", "threshold-never-set", threshold=-1.0),
    _case("BatchTopKSAE", "in-checkpoints", at="checkpoints/ae_100000.pt"),
    _case("MatryoshkaBatchTopKSAE", "misspelt", misspelt=True),
    _case("AutoEncoderTopK", "topk-said", semantics={"dict_class": "AutoEncoderTopK"}),
    _case("BatchTopKSAE", "batchtopk-said", semantics={"dict_class": "BatchTopKSAE"}),
    _case("AutoEncoderNew", "new-stated", stated="dictionary_learning"),
    _transcoder(),
]
