"""sparsify's format: what its cfg.json says, what it must not contradict, and what is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_sae
from tests.checkpoints import D, S, inputs
from tests.checkpoints.sparsify import CONFIG, tensors, write
from tests.stated import facts_of, read_stated


def weights(**more: Any) -> dict[str, Any]:
    found = {**tensors(S, unit=True, skip=False), **more}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def test_where_each_fact_came_from(tmp_path: Path) -> None:
    assert facts_of(read_stated(write(tmp_path, CONFIG, weights()))) == {
        "k": (4, "cfg.json"),
        "activation": ("topk", "cfg.json"),
        "transcode": (False, "cfg.json"),
        "pre_bias": (True, "cfg.json"),
        "decoder_norm": ("unit", "file"),
    }


def test_a_transcoder_subtracts_nothing_and_promises_no_unit_rows(tmp_path: Path) -> None:
    config, free = {**CONFIG, "transcode": True}, {"W_dec": 2 * weights()["W_dec"]}
    sae = read_stated(write(tmp_path, config, weights(**free)))
    assert facts_of(sae)["pre_bias"][0] is False
    assert facts_of(sae)["decoder_norm"] == ("free", "file")
    assert sae.record.notes == ()


def test_without_cfg_what_it_says_is_asked_for_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sae.safetensors"
    save_file(weights(), path)
    with pytest.raises(SpecError, match=r"does not say: k .*; activation .*; transcode"):
        read_sae(path)
    said = {"k": 4, "activation": "topk", "transcode": False}
    alone = read_stated(path, **said)
    beside = read_sae(write(tmp_path / "all", CONFIG, weights()))
    x_nd = inputs()
    assert torch.equal(alone.encode(x_nd).dense(), beside.encode(x_nd).dense())
    assert facts_of(read_stated(path, **said))["k"] == (4, "entry")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation": "softmax"}, "activation = 'softmax'"),
        ({"activation": ["topk"]}, "activation = "),
        ({"k": 0}, "k is 0"),
        ({"k": S + 1}, "not possible"),
        ({"k": "4"}, "not a number"),
        ({"activation": "groupmax", "k": 5}, "16 latents are not 5 groups"),
        ({"activation": "groupmax", "signed": True}, "exclude each other"),
        ({"transcode": 1}, "transcode is 1"),
        ({"skip_connection": True}, "W_skip is not there"),
        ({"num_latents": 99}, "says 8 x 99"),
        ({"expansion_factor": 3}, "says 8 x 24"),
        ({"expansion_factor": None}, "expansion_factor is None"),
    ],
)
def test_a_cfg_that_does_not_fit(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write(tmp_path, {**CONFIG, **changes}, weights())
    with pytest.raises(WeightsError, match=said):
        read_sae(path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"W_skip": torch.zeros(D, D)}, "W_skip is there"),
        ({"scale": torch.ones(D)}, "no place for: scale"),
        ({"encoder.weight": torch.ones(D, S)}, "a matrix is transposed"),
        ({"b_dec": torch.zeros(D, dtype=torch.int64)}, "no float"),
    ],
)
def test_tensors_that_do_not_belong(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=said):
        read_sae(write(tmp_path, CONFIG, weights(**more)))


def test_what_is_given_must_not_contradict_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, CONFIG, weights())
    assert read_stated(path, k=4).k == 4
    with pytest.raises(SpecError, match=r"k = 8 is entry, and the cfg.json says 4"):
        read_stated(path, k=8)


def test_the_runs_own_config_says_what_it_was_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path, CONFIG, weights())
    run = path.parent / "config.json"
    run.write_text(json.dumps({"model": "org/a-model", "dataset": "org/texts"}))
    assert read_sae(path).record.trained_on == {"model": "org/a-model", "dataset": "org/texts"}
