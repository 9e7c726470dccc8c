"""UniversalSAE's files: what is always so, what its yaml alone says, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_sae
from saebench.formats.facts import Facts, MissingFacts
from saebench.saes import Sae
from tests.checkpoints import D, S, inputs, rows
from tests.checkpoints.overcomplete import dictionary, mlp
from tests.checkpoints.universal_sae import state_of, wrapped, write

SAID: dict[str, Any] = {"k": 12, "input_mean": 0.25, "input_std": 2.0}


def read(folder: Path, checkpoint: dict[str, Any], **said: Any) -> Sae:
    return read_sae(write(folder, checkpoint), facts=Facts(said))


def test_where_each_fact_came_from(tmp_path: Path) -> None:
    record = read(tmp_path, wrapped(state_of()), **SAID).record
    assert {fact.name: (fact.value, fact.source) for fact in record.facts} == {
        "pre_bias": (False, "format"),
        "dictionary_norm": ("l2", "format"),
        "decoder_norm": ("unit", "file"),
        "activation": ("topk", "format"),
        "k": (12, "given"),
        "input_mean": (0.25, "given"),
        "input_std": (2.0, "given"),
    }


def test_rows_are_normalised_at_every_use_whatever_they_are_in_the_file(tmp_path: Path) -> None:
    sae = read(tmp_path, wrapped(state_of()), **SAID)
    torch.testing.assert_close(sae.W_dec_sd, rows(unit=True))
    as_stored = read(tmp_path, wrapped(state_of()), dictionary_norm="identity", **SAID)
    torch.testing.assert_close(as_stored.W_dec_sd, rows())


def test_what_its_yaml_says_is_asked_for_at_once_and_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(MissingFacts, match=r"input_std = model_std \+ 0.00001") as caught:
        read(tmp_path, wrapped(state_of()))
    assert [(one.name, one.estimate) for one in caught.value.missing] == [("k", ""), ("input", "")]


def test_the_deviation_and_what_is_added_to_it_divide(tmp_path: Path) -> None:
    """As its data set does: (x − mean) / (std + 1e-5), with the numbers of its DINOv2."""
    mean, std = 0.03290482237935066, 2.474064350128174
    said = {"input_mean": mean, "input_std": std + 1e-5}
    u_nd, _ = read(tmp_path, wrapped(state_of()), k=4, **said).scaling(inputs())
    expected = (inputs().double() - mean) / (std + 1e-5)
    torch.testing.assert_close(u_nd.double(), expected, rtol=3e-7, atol=3e-7)


def test_the_number_of_batches_and_the_optimizer_decide_nothing(tmp_path: Path) -> None:
    one = wrapped(state_of())
    other = wrapped({**state_of(), "encoder.final_block.1.num_batches_tracked": torch.tensor(7)})
    other |= {"epoch": 3, "learning_rate": 1.0, "optimizer_state_dict": {}}
    codes = [read(tmp_path, found, **SAID).encode(inputs()).dense() for found in (one, other)]
    assert torch.equal(*codes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scaler": torch.ones(D)}, "no place for: scaler"),
        ({"model_state_dict": {**state_of(), "thresholds": torch.ones(S)}}, "no place for: thres"),
        (
            {"model_state_dict": {**state_of(), "dictionary._weights": torch.ones(S)}},
            "make no dict",
        ),
        ({"model_state_dict": {"dictionary._weights": rows(S, 9), **mlp(norm="bn")}}, "asks for"),
    ],
)
def test_what_does_not_belong(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=said):
        read(tmp_path, {**wrapped(state_of()), **changes}, k=4, input="raw")


def test_a_max_norm_was_another_one_then(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="one of l2, l1, identity"):
        read(tmp_path, wrapped(state_of()), dictionary_norm="max_l2", **SAID)


def test_without_its_wrapper_it_is_a_file_of_overcomplete(tmp_path: Path) -> None:
    path = write(tmp_path, {**mlp(norm="bn"), **dictionary(rows(), None)})
    said = Facts({"activation": "topk", "k": 12, "dictionary_norm": "l2"})
    assert read_sae(path, facts=said).record.format == "overcomplete"
