"""Llama Scope: the units of the threshold, and configurations that are not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import WeightsError
from saebench.formats import read_sae
from tests.checkpoints import D, S
from tests.checkpoints.language import LLAMA, llama, write_llama


def test_the_threshold_is_strict_and_in_units_of_raw_activations(tmp_path: Path) -> None:
    # One latent a dimension, decoder columns of length 2: the project's latents are 2·x.
    weights = {
        "encoder.weight": torch.eye(D),
        "encoder.bias": torch.zeros(D),
        "decoder.weight": 2 * torch.eye(D),
        "decoder.bias": torch.zeros(D),
    }
    norms = {"in": 0.25, "out": 0.25}
    config = {**LLAMA, "d_sae": D, "jump_relu_threshold": 0.5}
    config["dataset_average_activation_norm"] = norms
    sae = read_sae(write_llama(tmp_path, config, weights))
    x_nd = torch.zeros(3, D)
    x_nd[:, 0] = torch.tensor([0.125, 0.25, 0.375])
    assert sae.encode(x_nd).dense()[:, 0].tolist() == [0.0, 0.0, 0.75]
    assert sae.decode(sae.encode(x_nd))[2, 0] == 0.75  # = 2·x: nothing of the norm is left


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"act_fn": "gelu"}, "act_fn of hyperparams.json is 'gelu'"),
        ({"act_fn": "topk", "jump_relu_threshold": 0, "top_k": None}, "top_k is None"),
        ({"jump_relu_threshold": -0.5}, "below 0"),
        ({"norm_activation": "batch-wise"}, "depends on other rows"),
        ({"dataset_average_activation_norm": None}, "dataset_average_activation_norm.in is None"),
        ({"dataset_average_activation_norm": {"in": 1, "out": 0}}, "not above 0"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"sparsity_include_decoder_norm": None}, "sparsity_include_decoder_norm"),
        ({"apply_decoder_bias_to_pre_encoder": 1}, "apply_decoder_bias_to_pre_encoder"),
        ({"d_model": 9}, "says d_model 9"),
        ({"d_sae": 9}, "d_sae 9"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=said):
        read_sae(write_llama(tmp_path, {**LLAMA, **change}, llama()))


def test_tensors_that_are_not_known_are_refused(tmp_path: Path) -> None:
    weights = {**llama(), "encoder_glu.weight": torch.zeros(S, D)}
    with pytest.raises(WeightsError, match=r"no place for: encoder_glu\.weight"):
        read_sae(write_llama(tmp_path, LLAMA, weights))


def test_without_a_decoder_bias(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in llama().items() if name != "decoder.bias"}
    config = {**LLAMA, "use_decoder_bias": False, "apply_decoder_bias_to_pre_encoder": True}
    sae = read_sae(write_llama(tmp_path, config, weights))
    assert not sae.b_dec_d.any()
    assert sae.b_pre_d is None
