"""visaebench's files: layouts told apart, which threshold holds, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_content, read_sae
from saebench.formats.content import sniff
from saebench.formats.facts import Facts, MissingFacts
from saebench.saes import Sae
from tests.checkpoints import D, S, inputs, rows
from tests.checkpoints.overcomplete import dictionary, scalar
from tests.checkpoints.visaebench import (
    INPUT,
    JUMPS,
    RUNNING,
    config_of,
    exported,
    simple,
    write,
)
from tests.stated import facts_of

EYE = {
    "encoder.weight": torch.eye(D),
    "encoder.bias": torch.zeros(D),
    "decoder.weight": torch.eye(D),
}
X = torch.tensor([[1.0, 0.9999999, 2.0, -1.0, 0.0, 0.5, 1.0, -2.0]])


def read(folder: Path, state: dict[str, Any], config: dict[str, Any] | None, **said: Any) -> Sae:
    return read_sae(write(folder, state, config), facts=Facts(said or INPUT))


def test_where_each_fact_came_from(tmp_path: Path) -> None:
    sae = read(tmp_path, simple(), config_of("batchtopk", threshold=0.75))
    assert facts_of(sae) == {
        "activation": ("batchtopk", "config.json"),
        "k": (4, "config.json"),
        "strict": (False, "format"),
        "threshold": (0.75, "config.json"),
        "input_mean": (INPUT["input_mean"], "given"),
        "input_std": (INPUT["input_std"], "given"),
        "pre_bias": (False, "format"),
        "decoder_norm": ("free", "file"),
    }
    assert sae.record.trained_on == {"model": "clip_vitb16"}


# --- the decoder's orientation ------------------------------------------------------------------


def test_its_configuration_tells_it_from_a_torch_decoder(tmp_path: Path) -> None:
    """At s = d the same tensors, with a trainer's configuration, are read the other way."""
    ours = read(tmp_path / "a", simple(D), config_of("topk", D))
    torch.testing.assert_close(ours.W_dec_sd, rows(D))
    trainer = {"dict_class": "AutoEncoderNew", "activation_dim": D, "dict_size": D}
    other = read_sae(write(tmp_path / "b", simple(D), {"trainer": trainer}))
    assert other.record.format == "dictionary_learning"
    torch.testing.assert_close(other.W_dec_sd, rows(D).T)


def test_at_another_size_a_torch_decoder_is_refused_and_not_turned(tmp_path: Path) -> None:
    state = {**simple(), "decoder.weight": rows().T.contiguous()}
    with pytest.raises(WeightsError, match="W_dec has shape"):
        read(tmp_path, state, config_of("topk"))


def test_without_a_configuration_both_are_possible(tmp_path: Path) -> None:
    path = write(tmp_path, simple(D), None)
    with pytest.raises(WeightsError, match=r"dictionary_learning, .*visaebench"):
        read_sae(path)
    facts = Facts({**INPUT, "activation": "topk", "k": 4})
    sae = read_content(sniff(path), facts, "visaebench")
    torch.testing.assert_close(sae.W_dec_sd, rows(D))


# --- thresholds ---------------------------------------------------------------------------------


def test_the_configured_threshold_holds_before_the_running_one(tmp_path: Path) -> None:
    both = read(tmp_path / "a", exported(**RUNNING), config_of("batchtopk", threshold=0.75))
    assert facts_of(both)["threshold"] == (0.75, "config.json")
    assert both.record.notes == (
        "config.json has threshold = 0.75, which holds, and the file 0.25",
    )
    running = read(tmp_path / "b", exported(**RUNNING), config_of("batchtopk"))
    assert facts_of(running)["threshold"] == (0.25, "file")
    assert running.record.notes == ()


def test_without_a_threshold_it_is_not_zero(tmp_path: Path) -> None:
    with pytest.raises(MissingFacts, match="visaebench's loader takes 0") as caught:
        read(tmp_path, exported(), config_of("batchtopk"))
    assert [(one.name, one.estimate) for one in caught.value.missing] == [
        ("threshold", "threshold")
    ]
    given = read(tmp_path, exported(), config_of("batchtopk"), threshold=0.5, **INPUT)
    assert facts_of(given)["threshold"] == (0.5, "given")


@pytest.mark.parametrize(
    ("more", "config", "kept"),
    [
        ({}, config_of("batchtopk", D, threshold=1.0), [1.0, 2.0, 1.0]),
        ({"jump_thresholds": torch.ones(D)}, config_of("jumprelu", D), [2.0]),
        ({"thresholds": torch.ones(D)}, config_of("jumprelu", D), [2.0]),
    ],
)
def test_a_batch_threshold_keeps_equality_and_a_jump_does_not(
    more: dict[str, Any], config: dict[str, Any], kept: list[float], tmp_path: Path
) -> None:
    sae = read(tmp_path, {**EYE, **more}, config, input="raw")
    assert sae.encode(X).values_m.tolist() == kept


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ({"thresholds": torch.zeros(D)}, [1.0, 2.0, 1.0]),  # exp(0), and kept where equal
        ({"jump_thresholds": torch.ones(D), "thresholds": torch.zeros(D)}, [2.0]),
    ],
)
def test_thresholds_that_overcomplete_wrote_are_logarithms(
    more: dict[str, Any], kept: list[float], tmp_path: Path
) -> None:
    state = {
        "encoder.final_block.0.weight": torch.eye(D),
        "encoder.final_block.0.bias": torch.zeros(D),
        **dictionary(torch.eye(D)),
        **more,
    }
    sae = read(tmp_path, state, config_of("jumprelu", D), input="raw")
    assert sae.encode(X).values_m.tolist() == kept


def test_a_jumprelu_without_thresholds_is_not_001(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="neither jump_thresholds nor thresholds"):
        read(tmp_path, simple(), config_of("jumprelu"))


# --- the configuration --------------------------------------------------------------------------


def test_activation_before_sae_type_before_architecture(tmp_path: Path) -> None:
    state = {**simple(), **RUNNING}
    config = {**config_of("topk"), "sae_type": "jumprelu", "activation": "BatchTopK"}
    assert read(tmp_path, state, config).architecture == "batchtopk"
    config = {**config_of("topk"), "sae_type": "batchtopk"}
    assert read(tmp_path, state, config).architecture == "batchtopk"


@pytest.mark.parametrize("name", ["relu", "gated", "top_k", 4])
def test_an_activation_that_is_not_known_is_no_topk(name: Any, tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"architecture = [^\n]*\n.*known: topk, batchtopk, jumprelu"
    ):
        read(tmp_path, simple(), config_of(name))


@pytest.mark.parametrize(
    ("state", "config", "said"),
    [
        ({**simple(), "W_skip": torch.ones(D)}, None, "no known SAE format"),
        ({**simple(), **RUNNING}, config_of("topk"), "said to be topk, and holds _running_thresh"),
        ({**simple(), "thresholds": JUMPS}, config_of("batchtopk"), "and holds thresholds"),
        ({**simple(), "jump_thresholds": scalar(1.0)}, config_of("jumprelu"), "shape"),
        ({**simple(), "_running_threshold": torch.ones(2)}, config_of("batchtopk"), "not a number"),
        ({**exported(), "decoder.bias": torch.ones(D)}, config_of("topk"), "no place for"),
        (simple(), {**config_of("topk"), "d_model": 9}, "d_model = 9, and the encoder is"),
        (simple(), {**config_of("topk"), "hidden_dim": 9}, "hidden_dim = 9"),
        (simple(), {**config_of("topk"), "k": 0}, "k is 0"),
        (simple(), {**config_of("topk"), "k": S + 1}, "not possible"),
        (simple(), config_of("batchtopk", threshold="0.5"), "not a number"),
        (
            {**simple(), "encoder.bias": torch.ones(S, dtype=torch.int32)},
            config_of("topk"),
            "float",
        ),
        ({**simple(), "encoder.weight": torch.ones(S)}, config_of("topk"), r"shape \[16\]"),
    ],
)
def test_what_does_not_fit(
    state: dict[str, Any], config: dict[str, Any] | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=said):
        read(tmp_path, state, config)


def test_input_scaling_is_asked_for_and_can_be_estimated(tmp_path: Path) -> None:
    with pytest.raises(MissingFacts) as caught:
        read(tmp_path, simple(), config_of("topk"), k=4)
    assert [(one.name, one.estimate) for one in caught.value.missing] == [("input", "standardise")]


def test_what_the_configuration_does_not_say_is_asked_for(tmp_path: Path) -> None:
    config = {key: value for key, value in config_of("topk").items() if key != "k"}
    with pytest.raises(SpecError, match=r"does not say: k "):
        read(tmp_path, simple(), config)
    assert read(tmp_path, simple(), config, k=3, **INPUT).k == 3
    path = write(tmp_path / "none", simple(), None)
    with pytest.raises(MissingFacts) as caught:
        read_content(sniff(path), Facts({**INPUT, "k": 4}), "visaebench")
    assert [one.name for one in caught.value.missing] == ["activation"]


def test_an_export_without_threshold_or_configuration_is_overcompletes(tmp_path: Path) -> None:
    path = write(tmp_path, exported(), None)
    said = Facts({"activation": "topk", "k": 4})
    assert read_sae(path, facts=said).record.format == "overcomplete"


def test_rows_of_an_export_are_normalised_as_overcomplete_does(tmp_path: Path) -> None:
    """visaebench's own loader takes them as they are in the file."""
    state = {**exported(), **dictionary(rows())}
    sae = read(tmp_path, state, config_of("topk"), dictionary_norm="l2", **INPUT)
    torch.testing.assert_close(sae.W_dec_sd, rows(unit=True))
    with pytest.raises(MissingFacts, match="dictionary_norm"):
        read(tmp_path, state, config_of("topk"))


def test_inputs_are_scaled_and_outputs_scaled_back(tmp_path: Path) -> None:
    raw = read(tmp_path, simple(), config_of("topk"), input="raw")
    scaled = read(tmp_path, simple(), config_of("topk"), input_mean=0.5, input_std=2.0)
    x_nd = inputs()
    expected = 2 * raw.decode(raw.encode(x_nd)) + 0.5
    torch.testing.assert_close(scaled.decode(scaled.encode(2 * x_nd + 0.5)), expected)
