"""dictionary_learning's format: which class it is, what decides it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import SpecError, WeightsError
from tests.checkpoints import D, S, inputs
from tests.checkpoints.dictionary_learning import (
    CLASSES,
    FACTOR,
    THRESHOLD,
    K,
    backup,
    config_of,
    tensors_of,
    write,
)
from tests.stated import facts_of
from tests.stated import read_stated as read


def test_where_each_fact_came_from(tmp_path: Path) -> None:
    sae = read(write(tmp_path, tensors_of("BatchTopKSAE"), config_of("BatchTopKSAE")))
    assert facts_of(sae) == {
        "dict_class": ("BatchTopKSAE", "config.json"),
        "activation": ("batchtopk", "config.json"),
        "pre_bias": (True, "config.json"),
        "decoder_norm": ("unit", "file"),
        "strict": (True, "format"),
        "k": (K, "file"),
        "threshold": (THRESHOLD, "file"),
    }
    assert sae.record.trained_on == {"model": "org/a-model", "hook": "resid_post_layer_10"}
    assert sae.record.notes == (f"trained with k = {K} latents a row on average",)


@pytest.mark.parametrize(
    ("dict_class", "architecture", "pre_bias"),
    [
        ("AutoEncoder", "relu", True),
        ("AutoEncoderNew", "relu", False),
        ("GatedAutoEncoder", "gated", True),
        ("JumpReluAutoEncoder", "jumprelu", False),
        ("AutoEncoderTopK", "topk", True),
        ("BatchTopKSAE", "batchtopk", True),
        ("MatryoshkaBatchTopKSAE", "matryoshka-batchtopk", True),
    ],
)
def test_every_class_is_what_it_is(
    dict_class: str, architecture: str, pre_bias: bool, tmp_path: Path
) -> None:
    sae = read(write(tmp_path, tensors_of(dict_class), config_of(dict_class)))
    assert sae.architecture == architecture
    assert (sae.b_pre_d is sae.b_dec_d) == pre_bias
    assert sae.prefixes == ((4, 8, 16) if "Matryoshka" in dict_class else ())


def test_the_same_tensors_are_two_saes_and_the_class_says_which(tmp_path: Path) -> None:
    tensors, x_nd = tensors_of("BatchTopKSAE"), inputs()
    topk = read(write(tmp_path / "a", tensors), dict_class="AutoEncoderTopK")
    batch = read(write(tmp_path / "b", tensors), dict_class="BatchTopKSAE")
    assert topk.k == K
    assert batch.k is None
    assert not torch.equal(topk.encode(x_nd).dense(), batch.encode(x_nd).dense())
    with pytest.raises(SpecError, match=r'"AutoEncoderTopK" \| "BatchTopKSAE"'):
        read(write(tmp_path / "c", tensors))


def test_a_value_at_the_threshold_is_not_active(tmp_path: Path) -> None:
    tensors = tensors_of("BatchTopKSAE", D)
    tensors |= {
        "encoder.weight": torch.eye(D),
        "encoder.bias": torch.zeros(D),
        "b_dec": torch.zeros(D),
        "threshold": torch.tensor(0.5),
    }
    sae = read(write(tmp_path, tensors, config_of("BatchTopKSAE")))
    x_1d = torch.tensor([[0.5, 0.25, 1.0, -1.0, 0.5, 2.0, 0.0, 0.75]])
    assert sae.encode(x_1d).dense().tolist() == [[0, 0, 1.0, 0, 0, 2.0, 0, 0.75]]


def test_a_threshold_that_was_never_set_is_said(tmp_path: Path) -> None:
    tensors = tensors_of("BatchTopKSAE", threshold=-1.0)
    sae = read(write(tmp_path, tensors, config_of("BatchTopKSAE")))
    assert "plain ReLU" in sae.record.notes[-1]
    x_nd = inputs()
    dense_ns = torch.relu((x_nd - sae.b_dec_d) @ sae.W_enc_ds + sae.b_enc_s)
    torch.testing.assert_close(sae.encode(x_nd).dense(), dense_ns)


@pytest.mark.parametrize("dict_class", CLASSES)
def test_a_finished_file_takes_raw_x_whatever_its_config_says(
    dict_class: str, tmp_path: Path
) -> None:
    """The library rescales before it saves, and leaves norm_factor in the configuration."""
    plain = read(write(tmp_path / "a", tensors_of(dict_class), config_of(dict_class)))
    config = config_of(dict_class, norm_factor=FACTOR)
    said = read(write(tmp_path / "b", tensors_of(dict_class), config))
    assert all(torch.equal(t, said.tensors[name]) for name, t in plain.tensors.items())


def test_a_backup_says_that_it_is_one(tmp_path: Path) -> None:
    sae = read(write(tmp_path, backup("MatryoshkaBatchTopKSAE")))
    assert facts_of(sae)["norm_factor"] == (FACTOR, "file")
    assert facts_of(sae)["dict_class"] == ("MatryoshkaBatchTopKSAE", "file")
    assert any("backup" in note for note in sae.record.notes)


def test_a_backup_without_a_factor_is_as_it_is(tmp_path: Path) -> None:
    sae = read(write(tmp_path / "a", backup("AutoEncoder", None)))
    plain = read(write(tmp_path / "b", tensors_of("AutoEncoder"), config_of("AutoEncoder")))
    assert torch.equal(sae.b_enc_s, plain.b_enc_s)


def without(tensors: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_the_first_topk_files_hold_neither_k_nor_threshold(tmp_path: Path) -> None:
    old = without(tensors_of("AutoEncoderTopK"), "k", "threshold")
    sae = read(write(tmp_path, old, config_of("AutoEncoderTopK")))
    assert sae.k == K
    assert facts_of(sae)["k"] == (K, "config.json")


def test_a_batchtopk_file_without_threshold_asks_for_one(tmp_path: Path) -> None:
    path = write(
        tmp_path, without(tensors_of("BatchTopKSAE"), "threshold"), config_of("BatchTopKSAE")
    )
    with pytest.raises(SpecError, match=r"(?s)threshold \(.*saebench estimate"):
        read(path)
    assert facts_of(read(path, threshold=0.25))["threshold"] == (0.25, "entry")


def test_trainers_of_relu_saes_write_autoencoder_for_both_classes(tmp_path: Path) -> None:
    sae = read(write(tmp_path, tensors_of("AutoEncoderNew"), config_of("AutoEncoder")))
    assert sae.b_pre_d is None
    assert facts_of(sae)["dict_class"] == ("AutoEncoderNew", "file")


@pytest.mark.parametrize("dict_class", ["AutoEncoderNew", "JumpReluAutoEncoder"])
def test_names_that_others_use_too_need_a_config_or_a_word(dict_class: str, tmp_path: Path) -> None:
    path = write(tmp_path, tensors_of(dict_class))
    with pytest.raises(WeightsError, match=r"could be of several formats.*dictionary_learning"):
        read(path)
    assert read(path, stated="dictionary_learning").d_sae == S


@pytest.mark.parametrize(
    ("dict_class", "config", "said"),
    [
        ("AutoEncoderTopK", config_of("AutoEncoderTopK", k=8), "k = 7, and config.json k = 8"),
        ("BatchTopKSAE", config_of("BatchTopKSAE", k=8), "k = 7, and config.json k = 8"),
        ("AutoEncoderTopK", config_of("AutoEncoderTopK", k="many"), "not a number"),
        ("AutoEncoder", config_of("GatedAutoEncoder"), "dict_class = 'GatedAutoEncoder', and the"),
        ("BatchTopKSAE", config_of("AutoEncoder"), "those of AutoEncoderTopK or BatchTopKSAE"),
    ],
)
def test_a_config_of_another_run(
    dict_class: str, config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=said):
        read(write(tmp_path, tensors_of(dict_class), config))


@pytest.mark.parametrize("dict_class", CLASSES)
def test_an_unknown_tensor_is_refused(dict_class: str, tmp_path: Path) -> None:
    tensors = {**tensors_of(dict_class), "scale": torch.ones(D)}
    with pytest.raises(WeightsError, match="no known SAE format"):
        read(write(tmp_path, tensors, config_of(dict_class)))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"group_sizes": torch.tensor([4, 4])}, "do not rise to d_sae"),
        ({"group_sizes": torch.tensor([8, -8, 16])}, "not a whole number of 1 or more"),
        ({"W_enc": torch.ones(S, D)}, "a matrix is transposed"),
        ({"threshold": torch.tensor(float("nan"))}, "not a number"),
    ],
)
def test_tensors_that_do_not_fit(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    tensors = {**tensors_of("MatryoshkaBatchTopKSAE"), **more}
    with pytest.raises(WeightsError, match=said):
        read(write(tmp_path, tensors, config_of("MatryoshkaBatchTopKSAE")))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"norm_factor": 0.0}, "norm_factor is 0.0"),
        ({"norm_factor": "large"}, "norm_factor is 'large'"),
        ({"ema": {}}, "no place for: ema"),
        ({"ae": {"W": torch.zeros(2)}}, "has the tensors W"),
        ({"ae": [1]}, "no class of dictionary_learning"),
    ],
)
def test_a_backup_that_is_damaged(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=said):
        read(write(tmp_path, {**backup("AutoEncoder"), **more}))
