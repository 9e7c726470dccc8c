"""saev's files: what each era leaves open is asked for, and what is not known is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_sae
from saebench.formats.facts import Facts, MissingFacts
from tests.checkpoints import D, S
from tests.checkpoints.saev import (
    BATCH,
    FIRST,
    NEW,
    OLD,
    TOP_K,
    activation,
    form_b,
    line,
    nested,
    state,
    write,
)

RELU = activation("Relu")


def missing(path: Path, **given: Any) -> dict[str, str]:
    """Fact -> how it may be estimated, of all that is asked for."""
    with pytest.raises(MissingFacts) as caught:
        read_sae(path, facts=Facts(given))
    return {one.name: one.estimate for one in caught.value.missing}


def test_the_first_files_ask_how_their_input_was_scaled(tmp_path: Path) -> None:
    path = write(tmp_path, FIRST, state())
    assert missing(path) == {"input": "mean_norm"}
    sae = read_sae(path, facts=Facts({"input": "raw"}))
    assert sae.b_pre_d is sae.b_dec_d


def test_schema_1_asks_unless_its_commit_tells(tmp_path: Path) -> None:
    path = write(tmp_path, form_b("unknown", RELU), state())
    assert missing(path) == {"pre_bias": "", "input": "mean_norm"}
    with pytest.raises(MissingFacts, match="of commit 'unknown'"):
        read_sae(path)
    path = write(tmp_path, line(1, OLD, cls="Relu"), state())
    assert missing(path) == {"pre_bias": "", "input": "mean_norm"}
    path = write(tmp_path, line(1, OLD, cls="Relu", commit="5951e84"), state())
    assert missing(path) == {"input": "mean_norm"}
    path = write(tmp_path, form_b("65c5a2b1", RELU), state())
    assert read_sae(path).b_pre_d is None


def test_a_batchtopk_without_a_threshold_asks_what_it_was(tmp_path: Path) -> None:
    path = write(tmp_path, line(4, {**NEW, "activation": BATCH}), state())
    assert missing(path) == {"activation": ""}
    assert missing(path, activation="batchtopk") == {"threshold": "threshold"}
    by_row = read_sae(path, facts=Facts({"activation": "topk"}))
    assert (by_row.k, by_row.architecture) == (4, "topk")
    first = write(
        tmp_path, line(1, {**OLD, "top_k": 4}, cls="BatchTopK", commit="5951e84"), state()
    )
    assert missing(first, input="raw") == {"threshold": "threshold"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pre_bias": True}, "pre_bias = True is given, and the file says False"),
        ({"threshold": 1.0}, "threshold = 1.0 is given, and the file says 0.5"),
        ({"input_mean": 0.5}, "input_mean: an SAE of this format has no such fact"),
        ({"k": 7}, "k = 7 is given, and the file says 4"),
    ],
)
def test_what_the_file_says_cannot_be_said_otherwise(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = write(tmp_path, nested(BATCH), state(stored=0.5))
    with pytest.raises(SpecError, match=said):
        read_sae(path, facts=Facts(given))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (line(6, {**NEW, "activation": RELU}), "schema 6 of saev"),
        (line(True, {**NEW, "activation": RELU}), "schema True of saev"),
        ({"schema": 5, "commit": "1", "lib": "1"}, "no  cfg"),
        ({**FIRST, "scale_mean": True}, "no place for: scale_mean"),
        (line(5, {**NEW, "activation": RELU}, seed=1), "no place for: seed"),
        (nested(RELU, bias="none"), "no place for: bias"),
        (nested(activation("TopK", top_k=3, order="magnitude")), "no place for: order"),
        (nested(activation("AbsBatchTopK", top_k=3)), "its activation is .*AbsBatchTopK"),
        (nested(activation("TopK", key="relu", top_k=3)), "TopK, and its key 'relu'"),
        (nested(activation("TopK", top_k=0)), "top_k is 0"),
        (nested(activation("TopK", top_k=2.5)), "top_k is 2.5"),
        (nested({"cls": ["TopK"], "params": {}}), "its activation is"),
        (line(5, NEW), "its activation is None"),
        (line(1, OLD, cls="JumpRelu"), "its class is 'JumpRelu'"),
        (nested(RELU, d_sae=2 * S), "d_sae = 32, and W_enc is"),
        (nested(RELU, d_model=2 * D), "d_model = 16, and W_enc is"),
        ({**FIRST, "exp_factor": 3}, "exp_factor = 3, and W_enc is"),
        (nested(RELU, normalize_w_dec="yes"), "normalize_w_dec is 'yes'"),
    ],
)
def test_a_line_that_is_not_known_is_refused(
    header: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=said):
        read_sae(write(tmp_path, header, state()), facts=Facts({"input": "raw"}))


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    weights = state()
    with pytest.raises(WeightsError, match=r"no place for: activation\.threshold"):
        read_sae(write(tmp_path, nested(TOP_K), state(stored=0.5)))
    with pytest.raises(WeightsError, match="no place for: b_gate"):
        read_sae(write(tmp_path, nested(RELU), {**weights, "b_gate": weights["b_enc"]}))
    with pytest.raises(WeightsError, match="needs the tensors b_dec"):
        read_sae(write(tmp_path, nested(RELU), {n: t for n, t in weights.items() if n != "b_dec"}))
    with pytest.raises(WeightsError, match=r"activation.threshold has shape \[16\]"):
        read_sae(write(tmp_path, nested(BATCH), {**weights, "activation.threshold": torch.ones(S)}))
    with pytest.raises(WeightsError, match=r"W_enc has shape \[128\]"):
        read_sae(write(tmp_path, nested(RELU), {**weights, "W_enc": torch.ones(D * S)}))


def test_another_line_of_json_is_not_saevs(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="of no known SAE format"):
        read_sae(write(tmp_path, {"d_in": D, "expansion": 2}, {"W": state()["W_enc"]}))


def test_what_is_known_is_recorded(tmp_path: Path) -> None:
    sae = read_sae(write(tmp_path, nested(TOP_K), state()))
    facts = {fact.name: fact.value for fact in sae.record.facts}
    assert facts == {
        "pre_bias": False,
        "input": "raw",
        "k": 10,
        "activation": "topk",
        "signed": True,
        "decoder_norm": "unit",
    }
    assert any("Matryoshka" in note for note in sae.record.notes)
