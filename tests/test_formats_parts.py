"""Version 2 of saebench's own format: whatever an `Sae` can be, and nothing that is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from saebench.activations import (
    Absolute,
    Activation,
    Gated,
    GroupMax,
    LatentNorm,
    LeakyReLU,
    Squash,
    Threshold,
    TopK,
)
from saebench.errors import WeightsError
from saebench.formats import read_sae, write_sae
from saebench.inputs import LayerNorm, Length, Scaling
from saebench.saes import Sae
from saebench.trunk import Block, Trunk
from tests.test_saes import D, N, S, make, numbers

X = 2 * numbers(N, D, seed=9) + 1


def with_activation(activation: Activation, architecture: str = "topk") -> Sae:
    return replace(make("topk"), activation=activation, architecture=architecture)


def with_trunk() -> Sae:
    blocks = (
        Block(numbers(D, 6, seed=11), numbers(6, seed=12)),
        Block(
            numbers(6, 6, seed=13),
            numbers(6, seed=14),
            gain_h=numbers(6, seed=15),
            shift_h=numbers(6, seed=16),
            residual=True,
        ),
    )
    return replace(make("relu"), W_enc_ds=numbers(6, S, seed=17), trunk=Trunk(blocks))


MADE: dict[str, Callable[[], Sae]] = {
    "layer norm": lambda: replace(make("relu"), scaling=Scaling(rows=LayerNorm(1e-7))),
    "length": lambda: replace(
        make("topk", pre_bias=True),
        scaling=Scaling(numbers(D, seed=8), numbers(D, seed=7).abs() + 0.1, Length(1.0)),
    ),
    "a pre-bias of its own": lambda: replace(make("relu"), b_pre_d=numbers(D, seed=21)),
    "magnitude": lambda: with_activation(TopK(5, signed=True, by_magnitude=True)),
    "absolute": lambda: with_activation(Absolute(TopK(5))),
    "soft cap": lambda: with_activation(Squash(TopK(5), 2.0)),
    "groupmax": lambda: with_activation(GroupMax(6), "groupmax"),
    "gated topk": lambda: with_activation(
        Gated(numbers(S, seed=5), numbers(S, seed=6), numbers(S, seed=7), k=9), "gated"
    ),
    "leaky": lambda: with_activation(LeakyReLU(0.1), "leaky-relu"),
    "inclusive": lambda: with_activation(Threshold(torch.tensor(0.5), inclusive=True), "batchtopk"),
    "latent norm": lambda: with_activation(
        LatentNorm(Threshold(), numbers(S, seed=5), numbers(S, seed=6)), "relu"
    ),
    "trunk": with_trunk,
    "transcoder": lambda: replace(
        make("relu"),
        W_dec_sd=numbers(S, 5, seed=31),
        b_dec_d=numbers(5, seed=32),
        skip_dd=numbers(5, D, seed=33),
        transcoder=True,
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_round_trip(name: str, tmp_path: Path) -> None:
    sae, path = MADE[name](), tmp_path / "sae.safetensors"
    write_sae(sae, path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["version"] == "2"
    back = read_sae(path)
    codes, again = sae.encode(X), back.encode(X)
    assert codes.n_nonzero > 0
    assert torch.equal(again.dense(), codes.dense())
    assert torch.equal(back.decode(again), sae.decode(codes))
    assert set(back.tensors) == set(sae.tensors)
    assert (back.transcoder, back.architecture) == (sae.transcoder, sae.architecture)


def test_a_pre_bias_that_is_the_decoders_is_stored_once_and_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "sae.safetensors"
    write_sae(with_activation(Squash(TopK(5))), path)
    sae = make("topk", pre_bias=True)
    write_sae(replace(sae, activation=Squash(TopK(5))), path)
    assert "b_pre_d" not in load_file(path)
    back = read_sae(path)
    assert back.b_pre_d is back.b_dec_d


def test_version_1_is_written_where_it_suffices(tmp_path: Path) -> None:
    path = tmp_path / "sae.safetensors"
    write_sae(make("jumprelu", pre_bias=True, scale=2.0), path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["version"] == "1"


def tampered(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    write_sae(with_activation(Squash(TopK(5), 2.0)), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    config, tensors = json.loads(metadata["config"]), load_file(path)
    change(config["sae"], tensors)
    save_file(tensors, path, {**metadata, "config": json.dumps(config)})
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda sae, _: sae.update(part="Popen"), "do not make an SAE: KeyError"),
        (lambda sae, _: sae["activation"].update(part="open"), "KeyError: 'open'"),
        (lambda sae, _: sae["activation"].update(colour=1), "unexpected keyword argument"),
        (lambda sae, _: sae["activation"]["inner"].update(k="5"), "do not make an SAE"),
        (lambda sae, _: sae["activation"].update(inner=3), "do not make an SAE"),
        (lambda sae, _: sae.pop("b_enc_s"), "b_enc_s"),
        (lambda sae, _: sae.update(b_enc_s={"tensor": "nowhere"}), "KeyError: 'nowhere'"),
        (lambda sae, _: sae.clear(), "do not make an SAE"),
        (lambda _, tensors: tensors.update(more=torch.zeros(1)), "nothing in it uses.*more"),
        (lambda _, tensors: tensors.update(b_enc_s=torch.zeros(3)), r"b_enc has shape \[3\]"),
    ],
)
def test_what_is_no_sae_is_refused(
    change: Callable[[dict[str, Any], dict[str, Any]], object], said: str, tmp_path: Path
) -> None:
    path = tampered(tmp_path / "sae.safetensors", change)
    with pytest.raises(WeightsError, match=said):
        read_sae(path)
