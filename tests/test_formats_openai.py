"""OpenAI's files: which are recognised, when rows are layer-normed, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_content, read_sae
from saebench.formats.content import sniff
from saebench.formats.facts import Facts
from saebench.inputs import LayerNorm
from tests.checkpoints import D, S, inputs
from tests.checkpoints.openai import class_state, original


def saved(folder: Path, state: dict[str, Any]) -> Path:
    torch.save(state, folder / "a.pt")
    return folder / "a.pt"


def test_topk_is_layer_normed_and_relu_is_not(tmp_path: Path) -> None:
    topk = read_sae(saved(tmp_path, original(class_state(S, "TopK", 12))))
    assert (topk.scaling.rows, topk.k, topk.architecture) == (LayerNorm(), 12, "topk")
    assert {fact.name: fact.value for fact in topk.record.facts}["row_norm"] == "layer_norm"
    relu = read_sae(saved(tmp_path, class_state(S, "ReLU", 0)))
    assert (relu.scaling.rows, relu.k, relu.architecture) == (None, None, "relu")


@pytest.mark.parametrize(
    ("activation", "loaders", "other"),
    [("TopK", LayerNorm(), "none"), ("ReLU", None, "layer_norm")],
)
def test_whose_norm_it_has_may_be_said(
    activation: str, loaders: LayerNorm | None, other: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, original(class_state(S, activation, 12)))
    sae = read_sae(path, facts=Facts({"row_norm": other}))
    assert sae.scaling.rows == (None if loaders else LayerNorm())
    assert [fact.source for fact in sae.record.facts if fact.name == "row_norm"] == ["given"]
    sae = read_sae(path)
    assert sae.scaling.rows == loaders
    assert any("their training script never" in note for note in sae.record.notes)
    with pytest.raises(SpecError, match="row_norm has to be one of layer_norm, none"):
        read_sae(path, facts=Facts({"row_norm": loaders is None}))


def test_postact_identity_keeps_negative_values(tmp_path: Path) -> None:
    state = original(class_state(S, "TopK", 12))
    state["activation_state_dict"] = {"k": 12, "postact_fn": "Identity"}
    codes = read_sae(saved(tmp_path, state)).encode(inputs())
    assert (codes.l0_n() == 12).all()
    assert (codes.values_m < 0).any()


@pytest.mark.parametrize("names", [("activation", "activation_state_dict"), ()])
def test_what_the_class_saves_again_may_be_of_monoloss(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    state = {
        name: value
        for name, value in class_state(S, "TopK", 12).items()
        if name in names or name not in ("activation", "activation_state_dict")
    }
    path = saved(tmp_path, state)
    with pytest.raises(WeightsError, match=r"several formats.*monoloss, openai"):
        read_sae(path)
    assert read_content(sniff(path), Facts(), "openai").scaling.rows == LayerNorm()
    with pytest.raises(SpecError, match="row_norm"):
        read_content(sniff(path), Facts(), "monoloss")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation": "Softmax"}, "activation is 'Softmax'"),
        ({"activation": 3}, "activation is '3'"),
        ({"activation_state_dict": {"k": 12, "postact_fn": "GELU"}}, "follows its TopK is 'GELU'"),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "the k of its activation is None"),
        ({"activation_state_dict": {"k": 0, "postact_fn": "ReLU"}}, "not a whole number"),
        ({"activation_state_dict": {"k": 99, "postact_fn": "ReLU"}}, "k = 99 of 16"),
        ({"gate": torch.zeros(S)}, "no place for: gate"),
        ({"decoder.linear.weight": torch.zeros(S, D)}, "to which it is tied"),
        ({"latent_bias": torch.zeros(S, dtype=torch.int64)}, "latent_bias is stored as int64"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = saved(tmp_path, {**original(class_state(S, "TopK", 12)), **change})
    with pytest.raises(WeightsError, match=said) as caught:
        read_sae(path)
    assert str(path) in caught.value.what


def test_two_k_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {**class_state(S, "TopK", 12), "activation.k": 5})
    with pytest.raises(WeightsError, match=r"of k \[5, 12\]"):
        read_content(sniff(path), Facts(), "openai")


def test_a_decoder_that_is_not_its_encoder_is_not_tied(tmp_path: Path) -> None:
    state = class_state(S, "ReLU", 0, tied=True)
    sae = read_sae(saved(tmp_path, state))
    assert torch.equal(sae.W_dec_sd, state["encoder.weight"])
    path = saved(tmp_path, {**state, "decoder.linear.weight": state["encoder.weight"] + 1})
    with pytest.raises(WeightsError, match="to which it is tied"):
        read_sae(path)
