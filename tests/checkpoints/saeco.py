"""saeco: VanillaSAE and Gated, with the normalisers that its files can have.

The state dict is of a whole trainer: each tensor under the names of the model, of its losses and
metrics, each of which has the normaliser twice. Names and shapes are those that saeco itself saves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Case, D, Forward, S, as64, numbers, relu, rows

State = dict[str, torch.Tensor]

PRIMED = {"mu_s": 1, "mu_e": 0, "std_s": 1, "std_e": 1}  # what saeco does if nobody says otherwise
LEARNED = {"mu_s": 0, "mu_e": 4, "std_s": 0, "std_e": 4}
ALL = {"mu_s": 1, "mu_e": 1, "std_s": 1, "std_e": 1}
NONE = {"mu_s": 0, "mu_e": 0, "std_s": 0, "std_e": 0}
PLACES = {
    False: ("saeco.architectures.vanilla.vanilla_model", "VanillaSAE"),
    True: ("saeco.architectures.gated.arch", "Gated"),
}


def reference(*, gated: bool, pre_bias: bool, s: int, norm: dict[str, int]) -> dict[str, Any]:
    """What the .arch_ref says, but for most of what only training asks for."""
    module, name = PLACES[gated]
    acts = {"d_data": D, "sites": ["transformer.h.6.input"], "excl_first": True}
    data = {
        "model_cfg": {"model_load_cfg": {"model_name": "gpt2"}, "acts_cfg": acts},
        "dataset": "alancooney/sae-monology-pile-uncopyrighted-tokenizer-gpt2",
        "seq_len": 128,
    }
    arch = {"pre_bias": pre_bias, **({"detach": True} if gated else {}), "generic_type": []}
    train = {"data_cfg": data, "optim": "RAdam", "input_sites": None, "target_sites": None}
    return {
        "class_ref": {"module": module, "cls_name": name, "source_backup": "import torch\n"},
        "config": {
            "arch_cfg": arch,
            "train_cfg": train,
            "normalizer_cfg": {**norm, "sandwich": False, "generic_type": []},
            "resampler_config": {"dead_threshold": 3e-06},
            "init_cfg": {"d_data": D, "dict_mult": s // D, "generic_type": []},
            "generic_type": [],
        },
    }


def own(*, gated: bool, pre_bias: bool, s: int) -> State:
    """The tensors of the model, by their names in it. pre_bias is the decoder's bias itself."""
    W_enc_sd, b_dec_d = numbers(s, D, seed=2), 0.4 * numbers(D, seed=4)
    decoder = {"decoder.weight": rows(s, unit=True).T.contiguous(), "decoder.bias": b_dec_d}
    if not gated:
        pre = {"encoder.encoder_pre.pre_bias.bias.negated_item": b_dec_d} if pre_bias else {}
        lin = "encoder.encoder_pre.lin."
        return {**pre, f"{lin}weight": W_enc_sd, f"{lin}bias": numbers(s, seed=3), **decoder}
    magnitude, gate = "encoder.magnitude.", "encoder.gate.module."
    pre = {f"{magnitude}pre_bias.bias.negated_item": b_dec_d, f"{gate}pre_bias.right": b_dec_d}
    return {
        **(pre if pre_bias else {}),
        f"{magnitude}r_mag.identity.weight": W_enc_sd,
        f"{magnitude}r_mag.exp_r.module": 0.5 * numbers(s, seed=5),
        f"{magnitude}bias.bias": 0.5 * numbers(s, seed=6),
        f"{gate}weight.weight": W_enc_sd,
        f"{gate}bias.bias": 0.5 * numbers(s, seed=7),
        **decoder,
    }


def normalizer(norm: dict[str, int]) -> State:
    """Its tensors: a mean and a deviation of each element, then of a sample. A learned
    deviation may be negative: its magnitude counts."""
    sign = torch.ones(D)
    sign[::3] = -1 if norm["std_e"] == 4 else 1
    every = {
        "_mu_e": torch.linspace(-1, 2, D)[None],
        "_std_e": (torch.linspace(0.5, 3, D) * sign)[None],
        "_mu_s": torch.tensor(0.7),
        "_std_s": torch.tensor(0.8),
    }
    return {name: value for name, value in every.items() if norm[name[1:]]}


def trained(model: State, norm: State, *, gated: bool) -> State:
    """The state dict of the trainer, as the model and the normaliser are registered in it."""

    def named(prefix: str, tensors: State, inside: str = "") -> State:
        chosen = {name: value for name, value in tensors.items() if name.startswith(inside)}
        return {f"{prefix}.{name[len(inside) :]}": value for name, value in chosen.items()}

    def around(prefix: str, tensors: State) -> State:
        normed = {**named(f"{prefix}.normalizer", norm), **named(f"{prefix}._normalizer", norm)}
        return {**tensors, **normed}

    state = {**named("normalizer", norm), **named("models.0", model)}
    losses = {"losses.L2_loss": model, "losses.sparsity_loss": model, "metrics.cosim": model}
    if gated:
        gate = named("encoder", model, "encoder.gate.module.")
        aux = {**gate, **named("decoder.lin", model, "decoder.")}
        losses |= {"losses.L2_aux_loss": aux, "losses.sparsity_loss": aux}
        state |= named("models.1", aux)
    for prefix, tensors in losses.items():
        state |= around(prefix, named(f"{prefix}.model.module", tensors))
    state |= around("model", named("model.model", model))
    state |= around("encode_only", named("encode_only.model", model, "encoder."))
    return {**state, **around("decode_only", named("decode_only.model", model, "decoder."))}


def averaged(state: State) -> State:
    """As torch's AveragedModel names the same."""
    return {"n_averaged": torch.tensor(7), **{f"module.{name}": v for name, v in state.items()}}


def write(folder: Path, said: dict[str, Any], state: State, kind: str = "weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "18001.arch_ref").write_text(json.dumps(said, separators=(",", ":")))
    path = folder / f"18001.{kind}.safetensors"  # a torch pickle, whatever it is called
    torch.save(state, path)
    return path


def forward_of(model: State, norm: State, *, gated: bool, pre_bias: bool) -> Forward:
    mean, std = np.zeros(D), np.ones(D)
    for name, value in norm.items():
        number = as64(value)[0].reshape(-1)
        if name.startswith("_mu"):
            mean = mean + number
        else:
            std = std * (np.abs(number) + 1e-7 if name == "_std_e" else number)

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        W_dec, b_dec = as64(model["decoder.weight"], model["decoder.bias"])
        u = (x - mean) / std - (b_dec if pre_bias else 0)
        if gated:
            names = ("r_mag.identity.weight", "r_mag.exp_r.module", "bias.bias")
            E, r, b_mag = as64(*(model[f"encoder.magnitude.{name}"] for name in names))
            is_open = u @ E.T + as64(model["encoder.gate.module.bias.bias"])[0] > 0
            z = is_open * relu(u @ E.T * np.exp(r) + b_mag)
        else:
            lin = "encoder.encoder_pre.lin."
            E, b = as64(model[f"{lin}weight"], model[f"{lin}bias"])
            z = relu(u @ E.T + b)
        return z, (z @ W_dec.T + b_dec) * std + mean

    return forward


def _case(
    name: str,
    *,
    gated: bool = False,
    pre_bias: bool = False,
    norm: dict[str, int] = PRIMED,
    s: int = S,
    average: bool = False,
) -> Case:
    model, norms = own(gated=gated, pre_bias=pre_bias, s=s), normalizer(norm)
    state = trained(model, norms, gated=gated)
    said = reference(gated=gated, pre_bias=pre_bias, s=s, norm=norm)
    kind, stored = ("avg_weights", averaged(state)) if average else ("weights", state)
    return Case(
        f"saeco/{name}",
        "saeco",
        lambda folder: write(folder, said, stored, kind),
        forward_of(model, norms, gated=gated, pre_bias=pre_bias),
    )


CASES = [
    _case("vanilla"),
    _case("vanilla-pre-bias", pre_bias=True, norm=ALL),
    _case("vanilla-raw", pre_bias=True, norm=NONE),
    _case("vanilla-averaged", average=True),
    _case("vanilla-square", pre_bias=True, s=D),
    _case("gated", gated=True, norm=LEARNED),
    _case("gated-pre-bias", gated=True, pre_bias=True),
    _case("gated-square", gated=True, pre_bias=True, norm=ALL, s=D),
]
