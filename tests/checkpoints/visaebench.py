"""visaebench: sae.pt or model.safetensors beside a configuration, in both layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.checkpoints import Case, D, S, as64, numbers, relu, rows, top
from tests.checkpoints.overcomplete import State, dictionary, dictionary64, mlp, pre_of, scalar

MEAN, STD = [0.25 * i for i in range(D)], 2.5
INPUT: dict[str, Any] = {"input_mean": MEAN, "input_std": STD}


def config_of(architecture: str, s: int = S, **more: Any) -> dict[str, Any]:
    """The keys of a released configuration."""
    return {
        "activation_dir": "/data/activations/clip_vitb16/layer11",
        "architecture": architecture,
        "backbone": "clip_vitb16",
        "batch_size": 4096,
        "d_model": D,
        "dict_size": s,
        "expansion_factor": s // D,
        "k": 4,
        "lr": 0.001,
        "num_epochs": 4,
        "seed": 42,
        "total_steps": 19200,
        **more,
    }


def simple(s: int = S, *, bias: bool = True) -> State:
    """Its decoder is [s d], which at s = d nothing but the layout says."""
    found = {
        "encoder.weight": numbers(s, D, seed=2),
        "encoder.bias": numbers(s, seed=3),
        "decoder.weight": rows(s),
    }
    return {**found, "decoder.bias": numbers(D, seed=4)} if bias else found


def exported(norm: str = "", **more: torch.Tensor) -> State:
    return {**mlp(norm=norm), **dictionary(rows(unit=True), 0.5), **more}


def write(
    folder: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None, *names: str
) -> Path:
    """`names`: the file of the weights, and of the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, beside = names or ("sae.pt", "config.json")
    if weights.endswith(".safetensors"):
        save_file(dict(state), folder / weights)
    else:
        torch.save(dict(state), folder / weights)
    if config is not None and beside.endswith(".json"):
        (folder / beside).write_text(json.dumps(config))
    elif config is not None:
        lines = [f"{key}: {json.dumps(value)}" for key, value in config.items()]
        (folder / beside).write_text("\n".join(lines) + "\n")
    return folder / weights


def _case(
    name: str,
    state: State,
    config: dict[str, Any] | None,
    *names: str,
    kind: str,
    theta: Any = None,
    strict: bool = False,
    stated: str | None = None,
    **semantics: Any,
) -> Case:
    """`theta`: the threshold that holds, of those that there are."""

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, bias = (x - MEAN) / STD, 0.0
        if "decoder.weight" in state:
            E, e, D_sd = as64(
                *(state[n] for n in ("encoder.weight", "encoder.bias", "decoder.weight"))
            )
            h = relu(u @ E.T + e)
            if "decoder.bias" in state:
                (bias,) = as64(state["decoder.bias"])
        else:
            D_sd = dictionary64(state)
            h = relu(pre_of(state, D_sd, u))
        keep = top(h, 4) if kind == "topk" else h > theta if strict else h >= theta
        z = h * keep
        return z, (z @ D_sd + bias) * STD + MEAN

    return Case(
        f"visaebench/{name}",
        "visaebench",
        lambda folder: write(folder, state, config, *names),
        forward,
        semantics={**INPUT, **semantics},
        stated=stated,
    )


JUMPS = torch.linspace(0.125, 1, S)
LOG = torch.linspace(-3, 0, S)
RUNNING = {"_running_threshold": scalar(0.25)}
_YAML = ("sae.pt", "config.yaml")

CASES = [
    _case("simple-topk", simple(), config_of("topk"), kind="topk"),
    _case("simple-square", simple(D), config_of("topk", D), kind="topk"),
    _case("simple-without-a-bias", simple(bias=False), config_of("topk"), *_YAML, kind="topk"),
    _case(
        "simple-batchtopk",
        simple(),
        config_of("batchtopk", threshold=0.75),
        *_YAML,
        kind="batchtopk",
        theta=0.75,
    ),
    _case(
        "simple-jumprelu",
        {**simple(), "jump_thresholds": JUMPS},
        config_of("jumprelu"),
        "model.safetensors",
        "config.yml",
        kind="jumprelu",
        theta=JUMPS.numpy(),
        strict=True,
    ),
    _case(
        "simple-thresholds",
        {**simple(), "thresholds": JUMPS},
        config_of("jumprelu"),
        kind="jumprelu",
        theta=JUMPS.numpy(),
        strict=True,
    ),
    _case(
        "simple-without-a-config",
        simple(D),
        None,
        kind="topk",
        stated="visaebench",
        activation="topk",
        k=4,
    ),
    _case("exported-topk", exported(), config_of("topk"), "model.pt", "config.json", kind="topk"),
    _case("exported-running", exported(**RUNNING), None, kind="batchtopk", theta=0.25),
    _case(
        "exported-configured",
        exported(),
        config_of("batchtopk", threshold=0.75),
        kind="batchtopk",
        theta=0.75,
    ),
    _case(
        "exported-both",
        exported(**RUNNING),
        config_of("batchtopk", threshold=0.75),
        kind="batchtopk",
        theta=0.75,
    ),
    _case(
        "exported-neither",
        exported(),
        config_of("batchtopk"),
        kind="batchtopk",
        theta=0.5,
        threshold=0.5,
    ),
    _case(
        "exported-jump",
        exported(thresholds=LOG),
        config_of("jumprelu"),
        kind="jumprelu",
        theta=LOG.double().exp().numpy(),
    ),
    _case("exported-batch-norm", exported("bn"), config_of("topk"), kind="topk"),
    _case("exported-layer-norm", exported("ln"), config_of("topk"), kind="topk"),
]
