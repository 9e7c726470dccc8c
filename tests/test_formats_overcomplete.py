"""overcomplete's files: what they say by themselves, what is asked for, and what is not read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_sae
from saebench.formats.facts import Facts, MissingFacts
from saebench.saes import Sae
from tests.checkpoints import D, S, inputs, numbers, rows
from tests.checkpoints.overcomplete import (
    FREE,
    TOPK,
    UNIT,
    State,
    archetypal,
    dictionary,
    mlp,
    scalar,
    tied,
    write_state,
)
from tests.foreign_classes import foreign
from tests.stated import facts_of


def read(folder: Path, state: State, **said: Any) -> Sae:
    return read_sae(write_state(folder, state), facts=Facts(said))


def asked(folder: Path, state: State, **said: Any) -> dict[str, str]:
    """Fact -> the ways to estimate it, of what is missing."""
    with pytest.raises(MissingFacts) as caught:
        read(folder, state, **said)
    return {one.name: one.estimate for one in caught.value.missing}


# --- what a file says by itself -----------------------------------------------------------------


def test_where_each_fact_came_from(tmp_path: Path) -> None:
    assert facts_of(read(tmp_path, {**mlp(), **UNIT}, **TOPK)) == {
        "activation": ("topk", "given"),
        "pre_bias": (False, "format"),
        "dictionary_norm": ("l2", "file"),
        "decoder_norm": ("unit", "file"),
        "input": ("raw", "format"),
        "k": (12, "given"),
    }


def test_a_jump_sae_is_told_by_its_thresholds_and_asks_for_nothing(tmp_path: Path) -> None:
    sae = read(tmp_path, {**mlp(), **UNIT, "thresholds": torch.full((S,), -1.0)})
    said = facts_of(sae)
    assert said["activation"] == ("jumprelu", "file")
    assert said["thresholds"] == ("logarithms", "file")
    assert said["strict"] == (False, "format")


@pytest.mark.parametrize("kind", ["jump", "batchtopk"])
def test_equality_with_a_threshold_is_kept(kind: str, tmp_path: Path) -> None:
    eye = {
        "encoder.final_block.0.weight": torch.eye(D),
        "encoder.final_block.0.bias": torch.zeros(D),
        **dictionary(torch.eye(D)),
    }
    if kind == "jump":  # exp(0) is exactly 1
        sae = read(tmp_path, {**eye, "thresholds": torch.zeros(D)})
    else:
        sae = read(tmp_path, eye, activation="batchtopk", threshold=1.0)
    below = math.nextafter(1.0, 0.0) - 1e-7
    x_nd = torch.tensor([[1.0, below, 2.0, -1.0, 0.0, 0.5, 1.0, -2.0]])
    assert sae.encode(x_nd).dense().tolist() == [[1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("W_sd", "mode"),
    [
        (rows(unit=True), "l2"),
        (rows() / rows().norm(dim=1).max(), "max_l2"),
        (rows() / rows().abs().sum(dim=1, keepdim=True), "l1"),
        (rows() / rows().abs().sum(dim=1).max(), "max_l1"),
    ],
    ids=["l2", "max_l2", "l1", "max_l1"],
)
def test_rows_that_are_normalised_say_how(W_sd: torch.Tensor, mode: str, tmp_path: Path) -> None:
    sae = read(tmp_path, {**mlp(), **dictionary(W_sd)}, **TOPK)
    said = facts_of(sae)
    assert said["dictionary_norm"] == (mode, "file")
    assert said["decoder_norm"][0] == ("unit" if mode == "l2" else "free")
    torch.testing.assert_close(sae.W_dec_sd, W_sd, rtol=1e-5, atol=0)


def test_what_is_given_holds_before_what_the_rows_look_like(tmp_path: Path) -> None:
    sae = read(tmp_path, {**mlp(), **UNIT}, dictionary_norm="l1", **TOPK)
    torch.testing.assert_close(sae.W_dec_sd.abs().sum(dim=1), torch.ones(S))
    assert any("dictionary_norm = l1 changes the length" in note for note in sae.record.notes)


def test_half_precision_is_normalised_to_what_it_resolves(tmp_path: Path) -> None:
    W_sd = rows(unit=True).bfloat16()
    state = {**mlp(), **dictionary(rows(unit=True)), "dictionary._weights": W_sd}
    state["encoder.final_block.0.weight"] = state["encoder.final_block.0.weight"].bfloat16()
    sae = read(tmp_path, state, **TOPK)
    assert facts_of(sae)["dictionary_norm"] == ("l2", "file")
    assert sae.stored_dtype == "bfloat16"
    lengths_s = W_sd.float().norm(dim=1)
    assert (lengths_s - 1).abs().max() > 1e-4  # what bfloat16 left of the normalisation
    torch.testing.assert_close(sae.W_dec_sd.norm(dim=1), torch.ones(S))


def test_a_multiplier_leaves_no_unit_rows(tmp_path: Path) -> None:
    sae = read(tmp_path, {**mlp(), **dictionary(rows(unit=True), math.log(3))}, **TOPK)
    assert facts_of(sae)["decoder_norm"] == ("free", "file")
    torch.testing.assert_close(sae.W_dec_sd.norm(dim=1), torch.full((S,), 3.0))


def test_a_dictionary_that_nothing_changes_is_not_copied(tmp_path: Path) -> None:
    sae = read(tmp_path, {"encoder.bias": numbers(S, seed=1), **UNIT}, activation="relu")
    assert sae.W_enc_ds.data_ptr() == sae.W_dec_sd.data_ptr()


# --- what is asked for --------------------------------------------------------------------------


def test_the_class_is_asked_for_before_what_only_one_of_them_has(tmp_path: Path) -> None:
    state = {**mlp(), **UNIT}
    assert asked(tmp_path, state) == {"activation": ""}
    assert asked(tmp_path, state, k=4) == {"activation": ""}
    assert asked(tmp_path, state, activation="topk") == {"k": ""}
    assert asked(tmp_path, state, activation="matching_pursuit") == {"k": ""}
    orthogonal = asked(tmp_path, state, activation="orthogonal_matching_pursuit")
    assert orthogonal == {"k": "", "max_iter": ""}
    assert asked(tmp_path, state, activation="batchtopk") == {"threshold": "threshold"}
    assert asked(tmp_path, state, activation="batchtopk", k=4) == {"threshold": "threshold"}


def test_k_is_recorded_for_the_estimate_of_a_threshold(tmp_path: Path) -> None:
    facts = Facts({"activation": "batchtopk", "k": 4}, giver="entry")
    with pytest.raises(MissingFacts):
        read_sae(write_state(tmp_path, {**mlp(), **UNIT}), facts=facts)
    assert [(one.value, one.source) for one in facts.record("").facts if one.name == "k"] == [
        (4, "entry")
    ]


def test_rows_that_are_not_normalised_are_asked_about(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"dictionary_norm \(.*lengths 0.5 to 2\)"):
        read(tmp_path, {**mlp(), **FREE}, **TOPK)


def test_before_multipliers_max_norms_were_others(tmp_path: Path) -> None:
    state = {**mlp(), **dictionary(rows(), None)}
    with pytest.raises(SpecError, match="one of l2, l1, identity"):
        read(tmp_path, state, dictionary_norm="max_l2", **TOPK)


@pytest.mark.parametrize(
    ("hidden", "asks"), [((D, D), True), ((5, 5), True), ((5,), False), ((D,), True), ((), False)]
)
def test_residual_is_asked_for_where_a_block_keeps_the_width(
    hidden: tuple[int, ...], asks: bool, tmp_path: Path
) -> None:
    state = {**mlp(norm="ln", hidden=hidden), **UNIT}
    if asks:
        assert asked(tmp_path, state, **TOPK) == {"residual": ""}
    else:
        assert read(tmp_path, state, **TOPK).trunk is None or len(hidden) == 1


def test_delta_is_asked_for_where_relax_may_not_be_clipped_yet(tmp_path: Path) -> None:
    assert asked(tmp_path, {**mlp(), **archetypal(written_back=False)}, **TOPK) == {"delta": ""}
    back = read(tmp_path, {**mlp(), **archetypal(written_back=True)}, **TOPK)
    assert facts_of(back)["dictionary_norm"] == ("archetypal", "file")
    none = {**archetypal(written_back=False), "dictionary.Relax": torch.zeros(S, D)}
    assert "delta" not in facts_of(read(tmp_path, {**mlp(), **none}, **TOPK))
    with pytest.raises(SpecError, match="not below 0"):
        read(tmp_path, {**mlp(), **archetypal(written_back=False)}, delta=-1.0, **TOPK)


def test_relax_is_clipped_to_nothing(tmp_path: Path) -> None:
    state = {**mlp(), **archetypal(written_back=False), "dictionary.multiplier": scalar(0.0)}
    state["dictionary.Relax"][0] = 0
    sae = read(tmp_path, state, delta=0, **TOPK)
    shares_sm = state["dictionary.W"].relu()
    shares_sm = shares_sm / shares_sm.sum(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec_sd, shares_sm @ state["dictionary.C"])


def test_inputs_are_raw_unless_somebody_says(tmp_path: Path) -> None:
    state = {**mlp(), **UNIT}
    raw = read(tmp_path, state, **TOPK).encode(inputs())
    scaled = read(tmp_path, state, input_mean=0.5, input_std=2.0, **TOPK)
    torch.testing.assert_close(scaled.encode(2 * inputs() + 0.5).dense(), raw.dense())


def test_pursuit_says_that_it_does_not_use_the_encoder(tmp_path: Path) -> None:
    said = {"activation": "matching_pursuit", "k": 3}
    assert read(tmp_path, UNIT, **said).record.notes == ()
    with_encoder = read(tmp_path, {**mlp(), **UNIT}, **said)
    assert with_encoder.record.notes == ("it has an encoder, which matching pursuit does not use",)
    alone = read(tmp_path, UNIT, **said)
    assert torch.equal(with_encoder.encode(inputs()).dense(), alone.encode(inputs()).dense())


# --- what is refused ----------------------------------------------------------------------------

_BN = mlp(norm="bn")


def without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({**mlp(), **UNIT, "Q": torch.linspace(0, 1, 4)}, "quantised SAE"),
        ({**mlp(), **UNIT, "encoder.attention_blocks.0.norm1.bias": torch.ones(D)}, "attention"),
        ({**mlp(), **UNIT, "encoder.resnet_blocks.0.conv1.weight": torch.ones(1)}, "convolutional"),
        ({**mlp(), **UNIT, "decoder.bias": torch.ones(D)}, "no place for: decoder.bias"),
        ({**mlp(), **UNIT, "encoder.weight": torch.ones(S, D)}, "no place for: encoder.weight"),
        ({**mlp(), **UNIT, "dictionary.W": torch.ones(S, D)}, "no place for: dictionary.W"),
        (
            {**without(_BN, "encoder.final_block.1.running_var"), **UNIT},
            "no batch norm with running statistics",
        ),
        (
            {**without(mlp(norm="bn"), "encoder.final_block.1.weight"), **UNIT},
            "no batch norm with running statistics",
        ),
        (
            {**without(mlp(hidden=(D,)), "encoder.final_block.0.weight"), **UNIT},
            "needs the tensors encoder.final_block.0.weight",
        ),
        (
            {**without(mlp(), "encoder.final_block.0.bias"), **UNIT},
            r"encoder.final_block.0.bias has to have shape \[16\], and has none",
        ),
        (
            {**without(mlp(hidden=(5, 5)), "encoder.mlp_blocks.0.0.weight"), **UNIT},
            "mlp_blocks.0 is missing",
        ),
        (
            {**mlp(hidden=(5, 5)), "encoder.mlp_blocks.1.0.weight": torch.ones(5, 6), **UNIT},
            "reads 6 dimensions, and what is before gives 5",
        ),
        (
            {**mlp(hidden=(5,)), "encoder.final_block.0.weight": torch.ones(S, 6), **UNIT},
            "its trunk gives 5",
        ),
        ({**mlp(norm="ln"), "encoder.final_block.1.bias": torch.ones(3), **UNIT}, "has to have"),
        ({"encoder.weight": torch.ones(S), **UNIT}, "is no matrix"),
        ({"encoder.weight": torch.ones(D, S), **UNIT}, "transposed"),
        ({"encoder.bias": torch.ones(3), **UNIT}, "b_enc has shape"),
        ({**tied(UNIT), "encoder.tied_to._weights": rows()}, "_weights should repeat"),
        ({**tied(UNIT), "encoder.tied_to.W": rows()}, "W should repeat"),
        ({**tied(UNIT), **mlp()}, "should repeat"),
        ({**mlp(), "dictionary._weights": torch.ones(S)}, "make no dictionary"),
        ({**mlp(), **UNIT, "dictionary.multiplier": torch.zeros(2)}, "multiplier has shape"),
        ({**mlp(), **archetypal(written_back=True), "dictionary.C": torch.ones(3, D)}, "make no"),
        ({**mlp(), **UNIT, "dictionary.multiplier": scalar(math.inf)}, "NaN or infinite"),
        (
            {**_BN, "encoder.final_block.1.running_var": torch.full((S,), -1.0), **UNIT},
            "NaN or infinite",
        ),
    ],
)
def test_what_does_not_belong_or_cannot_be_read(state: State, said: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=said):
        read(tmp_path, state, **TOPK)


@pytest.mark.parametrize("thresholds", [scalar(0.0), torch.zeros(S, 1), torch.zeros(3)])
def test_thresholds_of_another_shape(thresholds: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="threshold"):
        read(tmp_path, {**mlp(), **UNIT, "thresholds": thresholds})


def test_which_pursuit_it_is_is_said_in_full(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="one of relu, topk, batchtopk, matching_pursuit, orthog"):
        read(tmp_path, UNIT, activation="omp", k=3)
    with pytest.raises(SpecError, match="OMPSAE orthogonal_matching_pursuit"):
        read(tmp_path, UNIT)
    with pytest.raises(SpecError, match="max_iter"):
        read(tmp_path, UNIT, activation="matching_pursuit", k=3, max_iter=10)


def test_a_module_pickled_whole_is_refused_with_what_to_save(tmp_path: Path) -> None:
    with foreign("overcomplete.sae.topk_sae.TopKSAE", {"top_k": 12}) as module:
        torch.save(module, tmp_path / "sae.pt")
    with pytest.raises(WeightsError, match=r"needs code.*TopKSAE") as caught:
        read_sae(tmp_path / "sae.pt")
    assert "torch.save(sae.state_dict(), path)" in caught.value.hint
