"""Files of the HugoFry family: what they record, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_sae
from saebench.formats.facts import Facts
from tests.checkpoints.patchsae import CONFIG, PATCHSAE, as_dict, saved, state
from tests.stated import read_stated

GATED = {"r_mag": torch.zeros(16), "b_mag": torch.zeros(16)}


@pytest.mark.parametrize(
    ("changes", "more", "said"),
    [
        ({"gated_sae": True}, GATED, "gated SAE of PatchSAE"),
        ({"gated_sae": True}, {}, "gated SAE of PatchSAE"),
        ({"gated_sae": None}, GATED, "gated SAE of PatchSAE"),
        ({}, {"W_skip": torch.zeros(8, 8)}, "no place for: W_skip"),
        ({"d_in": 16}, {}, "says 16 x 16, and W_enc is"),
        ({"expansion_factor": 4}, {}, "says 8 x 32, and W_enc is"),
        ({"expansion_factor": None, "d_sae": 9}, {}, "says 8 x 9, and W_enc is"),
    ],
)
def test_what_is_not_such_an_sae_is_refused(
    changes: dict[str, Any], more: dict[str, torch.Tensor], said: str, tmp_path: Path
) -> None:
    path = saved(PATCHSAE)(tmp_path, {**CONFIG, **changes}, {**state(), **more})
    with pytest.raises(WeightsError, match=said):
        read_sae(path)


def test_what_is_known_is_recorded_and_cannot_be_said_otherwise(tmp_path: Path) -> None:
    path = as_dict(tmp_path, {**CONFIG, "class_token": True}, state())
    record = read_sae(path).record
    assert {fact.name: fact.value for fact in record.facts} == {
        "activation": "relu",
        "pre_bias": True,
        "input": "raw",
        "decoder_norm": "unit",
    }
    assert record.trained_on == {
        "model": "openai/clip-vit-base-patch16",
        "hook": "resid of block -2",
        "tokens": "cls",
        "dataset": "evanarlian/imagenet_1k_resized_256",
    }
    with pytest.raises(SpecError, match="pre_bias = False is given"):
        read_sae(path, facts=Facts({"pre_bias": False}))


def test_a_clip_of_their_own_is_noted(tmp_path: Path) -> None:
    config = {**CONFIG, "custom_clip_ckpt_path": "clip.pt"}
    notes = read_sae(saved(PATCHSAE)(tmp_path, config, state())).record.notes
    assert any("not the published one" in note for note in notes)


def test_the_other_family_cannot_be_stated(tmp_path: Path) -> None:
    path = saved(PATCHSAE)(tmp_path, CONFIG, state())
    with pytest.raises(SpecError, match="is 'patchsae' by its content"):
        read_stated(path, "prisma")


@pytest.mark.parametrize(
    ("said", "tokens"),
    [
        (True, "cls"),
        (None, "all"),
        ("only", "cls"),
        ("include", "all"),
        ("exclude", "patches"),
        ("some", None),
    ],
)
def test_its_tokens_in_each_projects_words(
    said: object, tokens: str | None, tmp_path: Path
) -> None:
    sae = read_sae(as_dict(tmp_path, {**CONFIG, "class_token": said}, state()))
    assert sae.record.trained_on.get("tokens") == tokens
