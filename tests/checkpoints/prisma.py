"""ViT-Prisma: a state dict beside config.json, or pickled with its configuration object."""

from __future__ import annotations

import gzip
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Case, D, S, as64, layer_norm, numbers, relu, rows, top
from tests.foreign_classes import foreign

CLASS = "vit_prisma.sae.config.VisionModelSAERunnerConfig"
CONFIG = {
    "model_class_name": "HookedViT",
    "model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    "vit_model_cfg": None,
    "hook_point_layer": 9,
    "layer_subtype": "hook_resid_post",
    "hook_point_head_index": None,
    "context_size": 50,
    "use_patches_only": False,
    "image_size": 224,
    "architecture": "standard",
    "b_dec_init_method": "geometric_median",
    "expansion_factor": 2,
    "is_transcoder": False,
    "transcoder_with_skip_connection": True,
    "out_hook_point_layer": 9,
    "layer_out_subtype": "hook_mlp_out",
    "d_out": 768,
    "_device": "cuda",
    "_dtype": "float32",
    "d_in": D,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "cls_token_only": False,
    "initialization_method": "encoder_transpose_decoder",
    "normalize_activations": "layer_norm",
    "lp_norm": 1,
    "dataset_name": "imagenet1k",
    "use_ghost_grads": True,
}
OLD = {  # of the first days: no activation but ReLU, no norm
    "model_classs_name": "HookedViT",
    "model_name": "wkcn/TinyCLIP-ViT-40M-32-Text-19M-LAION400M",
    "hook_point_layer": 9,
    "hook_point": "blocks.9.hook_mlp_out",
    "context_size": 50,
    "d_in": D,
    "d_sae": S,
    "expansion_factor": 2,
    "device": torch.device("cpu"),
    "dtype": torch.float32,
}
LEGACY = {"hook_point": "blocks.10.hook_resid_post", "hook_point_layer": [10], "d_in": D}

Write = Callable[[Path, Mapping[str, Any], Mapping[str, torch.Tensor]], Path]


def as_state(weights: Mapping[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """As `state_dict()` of a torch module gives it."""
    state = OrderedDict(weights)
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return state


def beside(folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Path:
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    torch.save(as_state(weights), folder / "weights.pt")
    return folder / "weights.pt"


def alone(folder: Path, _: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Path:
    torch.save(as_state(weights), folder / "n_images_2600058.pt")
    return folder / "n_images_2600058.pt"


def pickled(folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Path:
    with foreign(CLASS, config) as cfg:
        torch.save({"cfg": cfg, "state_dict": as_state(weights)}, folder / "n_images_1.pt")
    return folder / "n_images_1.pt"


def zipped(folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Path:
    with foreign(CLASS, config) as cfg, gzip.open(folder / "sae.pkl.gz", "wb") as file:
        pickle.dump({"cfg": cfg, "state_dict": as_state(weights)}, file)
    return folder / "sae.pkl.gz"


def bare(folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Path:
    with foreign(CLASS, config) as cfg, (folder / "sae.pkl").open("wb") as file:
        pickle.dump({"cfg": cfg, "state_dict": as_state(weights)}, file)
    return folder / "sae.pkl"


def legacy(folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Path:
    inside = {"state_dict": as_state(weights)}
    torch.save({"config": dict(config), "autoencoder": inside}, folder / "sae.pt")
    return folder / "sae.pt"


def state(s: int = S, *extra: str, d_out: int = D) -> dict[str, torch.Tensor]:
    free = "b_gate" in extra
    found = {
        "W_enc": numbers(D, s, seed=2),
        "b_enc": 3 * numbers(s, seed=3),
        "W_dec": rows(s, d_out, unit=not free),
        "b_dec": numbers(D, seed=4),
        "b_gate": numbers(s, seed=5),
        "r_mag": numbers(s, seed=6),
        "b_mag": numbers(s, seed=7),
        "b_dec_out": numbers(d_out, seed=8),
        "W_skip": numbers(D, D, seed=9),
    }
    always = ("W_enc", "b_enc", "W_dec", "b_dec")
    return {name: found[name] for name in (*always, *extra)}


def _normed(x: np.ndarray, norm: str | None) -> tuple[np.ndarray, np.ndarray | float, Any]:
    """(u, what u is multiplied by, what is added) to have x again."""
    if norm == "layer_norm":
        u, mean, std = layer_norm(x)
        return u, std, mean
    if norm == "constant_norm_rescale":
        scale = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(x.shape[1])
        return x / scale, scale, 0.0
    return x, 1.0, 0.0


def _activate(pre: np.ndarray, name: str, **kwargs: Any) -> np.ndarray:
    if name == "topk":
        return relu(pre) * top(pre, kwargs["k"])
    if name == "leaky_relu":
        return np.where(pre > 0, pre, pre * kwargs.get("negative_slope", 0.01))
    return np.tanh(relu(pre)) if name == "tanh-relu" else relu(pre)


def _case(
    name: str,
    write: Write = beside,
    *,
    config: Mapping[str, Any] = CONFIG,
    weights: Mapping[str, torch.Tensor] | None = None,
    norm: str | None = None,
    without: str = "",
    said: Mapping[str, Any] | None = None,
    stated: str | None = None,
    act: str = "relu",
    kwargs: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Case:
    """`act`, `kwargs` and `norm` are what is computed, and what a full configuration says."""
    found = weights or state()
    kwargs = kwargs or {}
    if config is CONFIG:
        words = {"activation_fn_str": act, "activation_fn_kwargs": dict(kwargs)}
        config = {**CONFIG, **words, "normalize_activations": norm or "none", **changes}
    config = {key: value for key, value in config.items() if key != without}

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        t = dict(zip(found, as64(*found.values()), strict=True))
        u, scale, shift = _normed(x, norm)
        pre = (u - t["b_dec"]) @ t["W_enc"]
        if "b_gate" in t:
            magnitude = (u - t["b_dec"]) @ (t["W_enc"] * np.exp(t["r_mag"])) + t["b_mag"]
            z = (pre + t["b_gate"] > 0) * _activate(magnitude, act, **kwargs)
        else:
            z = _activate(pre + t["b_enc"], act, **kwargs)
        out = z @ t["W_dec"] + t.get("b_dec_out", t["b_dec"])
        if "W_skip" in t:
            out = out + x @ t["W_skip"].T
        return z, out * scale + shift

    return Case(
        f"prisma/{name}",
        "prisma",
        lambda folder: write(folder, config, found),
        forward,
        said or {},
        stated,
        transcoder="b_dec_out" in found,
    )


GATED = state(S, "b_gate", "r_mag", "b_mag")
TRANSCODER = {"is_transcoder": True, "transcoder_with_skip_connection": False}

CASES = [
    _case("relu-layer-norm", norm="layer_norm"),
    _case("norm-not-said", norm="layer_norm", without="normalize_activations"),
    _case("relu-none"),
    _case("square", weights=state(D), norm="layer_norm", expansion_factor=1),
    _case("constant-norm", norm="constant_norm_rescale"),
    _case("topk", act="topk", kwargs={"k": 14}, cls_token_only=True),  # some kept are negative
    _case("tanh-relu", act="tanh-relu", norm="layer_norm"),
    _case("leaky-relu", bare, act="leaky_relu", kwargs={"negative_slope": 0.1}),
    _case("pickled", pickled, norm="layer_norm"),
    _case("pickled-topk-gz", zipped, act="topk", kwargs={"k": 4}),
    _case("gated-gz", zipped, weights=GATED, architecture="gated"),
    _case(
        *("gated-tanh-layer-norm", pickled),
        weights=GATED,
        architecture="gated",
        act="tanh-relu",
        norm="layer_norm",
    ),
    _case(  # its k largest are taken before the gate closes some of them
        *("gated-topk", pickled),
        weights=GATED,
        architecture="gated",
        act="topk",
        kwargs={"k": 10},
        norm="layer_norm",
    ),
    _case(
        "transcoder",
        weights=state(S, "b_dec_out", d_out=D + 4),
        norm="layer_norm",
        d_out=D + 4,
        **TRANSCODER,
    ),
    _case(
        *("transcoder-skip", pickled),
        weights=state(S, "b_dec_out", "W_skip"),
        norm="layer_norm",
        d_out=D,
        is_transcoder=True,
    ),
    _case(
        *("pickled-old", pickled),
        config=OLD,
        said={"row_norm": "none", "activation": "relu"},
    ),
    _case("legacy", legacy, config=LEGACY, said={"row_norm": "none"}),
    _case(
        *("alone", alone),
        said={"row_norm": "layer_norm", "activation": "topk", "k": 5},
        stated="prisma",
        act="topk",
        kwargs={"k": 5},
        norm="layer_norm",
    ),
]
