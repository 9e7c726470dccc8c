"""MSAE: what the file's name says, what is given instead, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saebench.activations import Squash, Threshold, TopK
from saebench.errors import SpecError, WeightsError
from saebench.formats import read_content
from saebench.formats.content import sniff
from saebench.formats.facts import Facts
from saebench.inputs import LayerNorm
from saebench.saes import Sae
from tests.checkpoints import D, S
from tests.checkpoints.msae import FACTOR, state, wrapper


def named(activation: str, *, n: int = S, tied: str = "False", rest: str = "False_0.0") -> str:
    return f"{n}_{D}_{activation}_{tied}_{rest}_cc3m.pth"


def read(folder: Path, name: str, content: dict[str, Any] | None = None, **given: Any) -> Sae:
    torch.save(content or wrapper(state()), folder / name)
    return read_content(sniff(folder / name), Facts(given))


def facts(sae: Sae) -> dict[str, tuple[Any, str]]:
    return {fact.name: (fact.value, fact.source) for fact in sae.record.facts}


def test_facts_of_the_name_say_so(tmp_path: Path) -> None:
    sae = read(tmp_path, named("TopKReLU_5", rest="True_30.0"))
    assert isinstance(sae.activation, Squash)
    assert (sae.activation.cap, sae.k, sae.scaling.rows) == (30.0, 5, LayerNorm())
    assert facts(sae)["k"] == (5, "file name")
    assert facts(sae)["row_norm"] == ("layer_norm", "file name")
    assert sae.scaling.scale == FACTOR


def test_what_is_given_comes_before_the_name(tmp_path: Path) -> None:
    sae = read(tmp_path, named("TopKReLU_5"), k=7, soft_cap=2.0, row_norm="layer_norm")
    assert isinstance(sae.activation, Squash)
    assert (sae.k, sae.activation.cap, sae.scaling.rows) == (7, 2.0, LayerNorm())
    assert facts(sae)["k"] == (7, "given")


@pytest.mark.parametrize(
    "given",
    [
        {"k": "five"},
        {"k": 0},
        {"k": 5.0},
        {"k": True},
        {"soft_cap": "no"},
        {"soft_cap": False},
        {"soft_cap": -1.0},
        {"row_norm": False},
        {"row_norm": ["none"]},
        {"activation": "topk"},
        {"activation": 5},
    ],
)
def test_what_is_given_has_to_be_possible(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=next(iter(given))):
        read(tmp_path, named("TopKReLU_5"), **given)


@pytest.mark.parametrize(
    "name",
    [
        "best.pth",
        named("TopKReLU_5", n=99),  # another SAE's name
        named("TopKReLU_5", tied="True"),  # and this one has a decoder
        named("TopKReLU_5").replace("0.0", "none"),
    ],
)
def test_a_name_that_is_not_this_file_s_says_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"activation .*soft_cap .*row_norm"):
        read(tmp_path, name)


def test_matryoshka_asks_for_one_of_its_k_or_is_read_in_full(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the smallest is 4"):
        read(tmp_path, named("TopKReLU_4_RW"))
    sae = read(tmp_path, named("TopKReLU_4_RW"), k=8)
    assert (sae.k, sae.architecture) == (8, "matryoshka-topk")
    full = read(tmp_path, named("TopKReLU_4_RW"), activation="ReLU")
    assert isinstance(full.activation, Threshold)
    assert (full.k, full.architecture) == (None, "relu")


@pytest.mark.parametrize("name", ["BatchTopK", "BatchTopKReLU", "BatchTopKabs", "BatchTopKabsReLU"])
def test_batchtopk_depends_on_the_batch_and_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="other rows"):
        read(tmp_path, named(f"{name}_5"))


def test_the_full_output_is_that_of_a_relu_only_where_it_is_one(tmp_path: Path) -> None:
    assert read(tmp_path, named("BatchTopKReLU_5"), activation="ReLU").architecture == "relu"
    with pytest.raises(SpecError, match="full output is not that of a ReLU"):
        read(tmp_path, named("TopKabs_5"), activation="ReLU")


@pytest.mark.parametrize(
    ("name", "said"),
    [("Identity", "its activation is 'Identity'"), ("JumpReLU_16", "no activation.log_threshold")],
)
def test_activations_that_are_not_read(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises((SpecError, WeightsError), match=said):
        read(tmp_path, named(name))


def test_stripped_of_its_wrapper_the_scaling_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"input \(its mean_center"):
        read(tmp_path, named("ReLU_03"), state())
    sae = read(tmp_path, named("ReLU_03"), state(), input_mean=0.5, input_std=2.0)
    assert sae.scaling.scale == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean_center": torch.zeros(D + 1)}, "mean_center has shape"),
        ({"mean_center": 0.0}, "mean_center is a float"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0"),
        ({"scaling_factor": "1"}, "scaling_factor is '1'"),
        ({"whitening": torch.zeros(D, D)}, "no place for: whitening"),
        ({"model": {**state(), "gate": torch.zeros(S)}}, "no place for: gate"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=said):
        read(tmp_path, named("ReLU_03"), {**wrapper(state()), **change})


def test_the_stored_mean_cannot_be_given_again(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="input_mean"):
        read(tmp_path, named("ReLU_03"), input_mean=0.0)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_numpy_numbers_are_read_as_numbers(kind: type, tmp_path: Path) -> None:
    content = {**wrapper(state()), "scaling_factor": kind(2)}
    assert read(tmp_path, named("ReLU_03"), content).scaling.scale == 2.0


def test_a_topk_s_kept_values_may_be_negative_only_without_its_relu(tmp_path: Path) -> None:
    signed = read(tmp_path, named("TopK_12")).activation
    assert isinstance(signed, TopK)
    assert signed.signed
    plain = read(tmp_path, named("TopKReLU_12")).activation
    assert isinstance(plain, TopK)
    assert not plain.signed
