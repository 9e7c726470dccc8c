"""CLIP-Scope: the scaling that no file has, signed latents, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_content, read_sae
from saebench.formats.content import sniff
from saebench.formats.facts import Facts
from tests.checkpoints import inputs
from tests.checkpoints.clipscope import SCALING, K, published, state, training


def saved(folder: Path, content: dict[str, Any]) -> Path:
    torch.save(content, folder / "a.pt")
    return folder / "a.pt"


def test_the_scaling_is_asked_for_and_can_be_estimated(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="z-scored") as caught:
        read_sae(saved(tmp_path, published()))
    assert "saebench estimate" in caught.value.hint


@pytest.mark.parametrize("content", [training(), state()])
def test_k_is_asked_for_where_only_a_training_knew_it(
    content: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=r"k \(how many latents"):
        read_content(sniff(saved(tmp_path, content)), Facts(SCALING))


def test_k_latents_are_kept_whatever_their_sign(tmp_path: Path) -> None:
    sae = read_content(sniff(saved(tmp_path, published())), Facts(SCALING))
    codes = sae.encode(inputs())
    assert (codes.l0_n() == K).all()
    assert (codes.values_m < 0).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 0}, "k is 0"),
        ({"d_in": 9}, "d_in is 9"),
        ({"n_features": 4}, "n_features is 4"),
        ({"batch_mean": torch.zeros(8)}, "no place for: batch_mean"),
        ({"model_state_dict": {**state(), "router": torch.zeros(2)}}, "no place for: router"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=said):
        read_content(sniff(saved(tmp_path, {**published(), **change})), Facts(SCALING))


def test_k_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="k = 5 is given, and the file says 12"):
        read_content(sniff(saved(tmp_path, published())), Facts({**SCALING, "k": 5}))
