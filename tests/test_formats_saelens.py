"""SAELens's format: its eras, what it keeps beside its weights, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saebench.activations import Squash, TopK
from saebench.errors import SpecError, WeightsError
from tests.checkpoints import D, S, inputs
from tests.checkpoints.saelens import (
    METADATA,
    SCALE,
    TOPK,
    K,
    config_of,
    old_config,
    tensors_of,
    write,
)
from tests.stated import facts_of
from tests.stated import read_stated as read


def test_where_each_fact_came_from(tmp_path: Path) -> None:
    sae = read(write(tmp_path, tensors_of("topk"), config_of("topk")))
    assert facts_of(sae) == {
        "architecture": ("topk", "cfg.json"),
        "activation": ("topk", "cfg.json"),
        "pre_bias": (True, "cfg.json"),
        "k": (K, "cfg.json"),
        "decoder_norm": ("free", "file"),
        "row_norm": ("none", "cfg.json"),
    }
    where = {"model": "org/a-model", "hook": "blocks.10.hook_resid_post", "dataset": "org/images"}
    assert sae.record.trained_on == where


@pytest.mark.parametrize("postact", ["relu", "ReLU"])
def test_a_relu_behind_topk_may_be_said(postact: str, tmp_path: Path) -> None:
    plain = read(write(tmp_path / "plain", tensors_of("topk"), config_of("topk")))
    config = config_of("topk", activation_fn_kwargs={"k": K, "postact_fn": postact})
    said = read(write(tmp_path / "said", tensors_of("topk"), config))
    assert torch.equal(said.encode(inputs()).dense(), plain.encode(inputs()).dense())


@pytest.mark.parametrize("key", ["hook_name", "hook_point"])
def test_what_a_flat_file_was_trained_on(key: str, tmp_path: Path) -> None:
    config = {**old_config(hook_name=None), key: "blocks.3.hook_resid_pre"}
    sae = read(write(tmp_path, tensors_of("standard"), config))
    assert sae.record.trained_on["hook"] == "blocks.3.hook_resid_pre"


def test_topk_is_topk_whatever_the_architecture_says(tmp_path: Path) -> None:
    sae = read(write(tmp_path, tensors_of("topk"), old_config(**TOPK)))
    assert isinstance(sae.activation, TopK)
    assert (sae.architecture, sae.k) == ("topk", K)


def test_a_missing_k_is_asked_for(tmp_path: Path) -> None:
    config = old_config(activation_fn_str="topk", activation_fn_kwargs=None)
    path = write(tmp_path, tensors_of("topk"), config)
    with pytest.raises(SpecError, match=r"does not say: k"):
        read(path)
    assert facts_of(read(path, k=3))["k"] == (3, "entry")


def test_a_missing_scale_is_asked_for_and_may_be_estimated(tmp_path: Path) -> None:
    config = config_of("standard", normalize_activations="expected_average_only_in")
    path = write(tmp_path, tensors_of("standard"), config)
    with pytest.raises(SpecError, match="saebench estimate"):
        read(path)
    assert read(path, input="raw").scaling.scale == 1.0
    assert read(path, input_std=4.0).scaling.scale == 0.25


def test_the_runs_own_scale_holds(tmp_path: Path) -> None:
    config = config_of("standard", normalize_activations="expected_average_only_in")
    path = write(tmp_path, tensors_of("standard"), config, SCALE)
    found = facts_of(read(path))["input_std"]
    assert found == (pytest.approx(1 / SCALE), "activation_scaler.json")
    with pytest.raises(SpecError, match=r"input_std = 4.0 is entry, and the activation_scaler"):
        read(path, input_std=4.0)


def test_a_batchtopk_stays_one_in_its_file_for_inference(tmp_path: Path) -> None:
    metadata = {**METADATA, "training_architecture": "batchtopk"}
    config = config_of("jumprelu", metadata=metadata)
    assert read(write(tmp_path, tensors_of("jumprelu"), config)).architecture == "batchtopk"


def test_a_matryoshka_keeps_its_widths_in_its_file_for_inference(tmp_path: Path) -> None:
    metadata = {
        **METADATA,
        "training_architecture": "matryoshka_batchtopk",
        "training_architecture_details": {"matryoshka_widths": [4, 8]},
    }
    config = config_of("jumprelu", metadata=metadata)
    sae = read(write(tmp_path, tensors_of("jumprelu"), config))
    assert (sae.architecture, sae.prefixes) == ("matryoshka-batchtopk", (4, 8, S))


def test_heads_are_noted(tmp_path: Path) -> None:
    old = old_config(hook_name="blocks.3.attn.hook_z")
    new = config_of("standard", reshape_activations="hook_z")
    for i, config in enumerate((old, new)):
        sae = read(write(tmp_path / str(i), tensors_of("standard"), config))
        assert any("heads" in note for note in sae.record.notes)


def test_tanh_of_every_activation(tmp_path: Path) -> None:
    config = old_config(architecture="jumprelu", activation_fn_str="tanh-relu")
    sae = read(write(tmp_path, tensors_of("jumprelu"), config))
    assert isinstance(sae.activation, Squash)
    assert (sae.encode(inputs()).values_m <= 1).all()


def test_a_dead_row_of_the_decoder_survives_rescaling(tmp_path: Path) -> None:
    tensors = tensors_of("topk")
    tensors["W_dec"][3] = 0
    config = config_of("topk", rescale_acts_by_decoder_norm=True)
    sae = read(write(tmp_path, tensors, config))
    assert torch.isfinite(sae.decode(sae.encode(inputs()))).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "matching_pursuit"}, "matching_pursuit is not read"),
        ({"architecture": "temporal"}, "temporal is not read"),
        ({"architecture": "crosscoder"}, "architecture = 'crosscoder'"),
        ({"architecture": ["standard"]}, "architecture = "),
        ({"normalize_activations": "batch_norm"}, "normalize_activations = 'batch_norm'"),
        ({"normalize_activations": ["none"]}, "normalize_activations = "),
        ({"reshape_activations": "hook_q"}, "reshape_activations = 'hook_q'"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes'"),
        ({"rescale_acts_by_decoder_norm": 1}, "rescale_acts_by_decoder_norm is 1"),
        ({"activation_fn": "gelu"}, "activation_fn = 'gelu'"),
        ({"activation_fn": "tanh-relu"}, "'topk' with tanh-relu"),
        ({"activation_fn": "relu"}, "contradict each other"),
        ({"activation_fn_kwargs": {"k": K + 1}}, "has two k"),
        ({"activation_fn_kwargs": {"postact_fn": "Identity"}}, "known: k, and postact_fn = relu"),
        ({"activation_fn_kwargs": {"k": K, "signed": True}}, "known: k, and postact_fn = relu"),
        ({"k": 0}, "k is 0"),
        ({"k": 2.5}, "not a whole number"),
        ({"k": 99}, "not possible"),
        ({"d_sae": 99}, "the configuration is another SAE's"),
        ({"d_in": None}, "d_in is None"),
    ],
)
def test_a_cfg_that_is_not_understood(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = {**config_of("topk"), **changes}
    with pytest.raises(WeightsError, match=said):
        read(write(tmp_path, tensors_of("topk"), config))


@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
def test_topk_with_another_architecture(architecture: str, tmp_path: Path) -> None:
    config = old_config(architecture=architecture, **TOPK)
    with pytest.raises(WeightsError, match="contradict each other"):
        read(write(tmp_path, tensors_of(architecture), config))


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("transcoder", {"apply_b_dec_to_input": True}, "b_dec is not of its input"),
        ("transcoder", {"d_out": None}, "d_out is None"),
        ("transcoder", {"normalize_activations": "expected_average_only_in"}, "the scale of what"),
        ("matryoshka_batchtopk", {"matryoshka_widths": []}, "no matryoshka_widths"),
        ("matryoshka_batchtopk", {"matryoshka_widths": [8, 4]}, "do not rise"),
    ],
)
def test_what_only_some_have(
    architecture: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = {**config_of(architecture), **changes}
    with pytest.raises(WeightsError, match=said):
        read(write(tmp_path, tensors_of(architecture), config))


@pytest.mark.parametrize(
    ("architecture", "more", "said"),
    [
        ("standard", {"threshold": torch.ones(S)}, "no place for: threshold"),
        ("standard", {"gain": torch.ones(S)}, "no place for: gain"),
        ("gated", {"b_enc": torch.ones(S)}, "no place for: b_enc"),
        ("jumprelu", {"log_threshold": torch.ones(S)}, "no place for: threshold"),
        ("standard", {"b_enc": torch.ones(D)}, r"b_enc \[16\], and it is \[8\]"),
        ("standard", {"W_dec": torch.ones(D, S)}, "a matrix is transposed"),
        ("standard", {"b_dec": torch.full((D,), float("inf"))}, "b_dec holds 8 NaN"),
        ("standard", {"scaling_factor": torch.full((S,), 2.0)}, "finetuning_scaling_factor = fal"),
    ],
)
def test_tensors_that_do_not_belong(
    architecture: str, more: dict[str, torch.Tensor], said: str, tmp_path: Path
) -> None:
    tensors = {**tensors_of(architecture), **more}
    with pytest.raises(WeightsError, match=said):
        read(write(tmp_path, tensors, config_of(architecture)))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="needs the tensors threshold"):
        read(write(tmp_path, tensors_of("standard"), config_of("jumprelu")))


def whitened(folder: Path, **changes: torch.Tensor | None) -> Path:
    path = write(
        folder,
        tensors_of("standard"),
        config_of("standard", normalize_activations="covariance_whitening"),
    )
    beside = folder / "activation_whitening.safetensors"
    tensors = {**load_file(beside), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, beside)
    return path


def test_whitening_without_its_file(tmp_path: Path) -> None:
    path = whitened(tmp_path)
    (tmp_path / "activation_whitening.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"activation_whitening.safetensors is not beside it"):
        read(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inverse_matrix": torch.eye(D)}, "not inverse to each other"),
        ({"matrix": torch.full((D, D), float("nan"))}, "not inverse to each other"),
        ({"matrix": torch.eye(D + 1)}, "not of 8 dimensions"),
        ({"mean": None}, "needs the tensors mean"),
        ({"scale": torch.ones(1)}, "no place for: scale"),
    ],
)
def test_whitening_that_does_not_fit(
    changes: dict[str, torch.Tensor | None], said: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=said):
        read(whitened(tmp_path, **changes))


def test_whitening_that_is_cut(tmp_path: Path) -> None:
    path = whitened(tmp_path)
    beside = tmp_path / "activation_whitening.safetensors"
    beside.write_bytes(beside.read_bytes()[:-5])
    with pytest.raises(WeightsError, match="download it again"):
        read(path)


def test_without_cfg_it_says_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path, tensors_of("standard"), config_of("standard"))
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(WeightsError, match=r"could be of several formats.*saelens"):
        read(path)
    with pytest.raises(WeightsError, match=r"cfg.json is not beside it"):
        read(path, stated="saelens")


@pytest.mark.parametrize("text", ["{nope", "[1]", '{"architecture": 1, "architecture": 2}'])
def test_a_damaged_cfg(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, tensors_of("standard"), config_of("standard"))
    (tmp_path / "cfg.json").write_text(text)
    with pytest.raises(WeightsError, match=r"cfg.json"):
        read(path)


@pytest.mark.parametrize("scale", [0, -1, float("inf"), "1"])
def test_a_damaged_scale(scale: Any, tmp_path: Path) -> None:
    config = config_of("standard", normalize_activations="expected_average_only_in")
    path = write(tmp_path, tensors_of("standard"), config)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    with pytest.raises(WeightsError, match="scaling_factor"):
        read(path)
