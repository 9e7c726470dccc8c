"""saeco: the classes, names and normalisers that are refused, and what its files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import WeightsError
from saebench.formats import read_sae
from tests.checkpoints import D, S, numbers, rows
from tests.checkpoints import saeco as made


def parts(
    *, gated: bool = False, pre_bias: bool = True, norm: dict[str, int] = made.PRIMED
) -> tuple[dict[str, Any], made.State]:
    """(what the .arch_ref says, the state dict)."""
    model = made.own(gated=gated, pre_bias=pre_bias, s=S)
    said = made.reference(gated=gated, pre_bias=pre_bias, s=S, norm=norm)
    return said, made.trained(model, made.normalizer(norm), gated=gated)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("saeco_research.architectures.prolu", "ProLuSAE"),
        ("saeco_research.architectures.mine", "VanillaSAE"),  # a class of that name, not that one
        ("saeco.architectures.gated.arch", "VanillaSAE"),
    ],
)
def test_another_class_is_refused_by_its_name(tmp_path: Path, module: str, name: str) -> None:
    said, state = parts()
    said["class_ref"] |= {"module": module, "cls_name": name}
    with pytest.raises(WeightsError, match=rf"18001\.arch_ref.*{module}\.{name}") as caught:
        read_sae(made.write(tmp_path, said, state))
    assert "write_sae" in caught.value.hint


@pytest.mark.parametrize(
    ("part", "value"), [("mu_e", 2), ("std_e", 3), ("std_s", 5), ("mu_s", 4), ("mu_s", None)]
)
def test_a_normaliser_that_depends_on_other_rows_is_refused(
    tmp_path: Path, part: str, value: int | None
) -> None:
    said, state = parts()
    said["config"]["normalizer_cfg"][part] = value
    with pytest.raises(WeightsError, match=f"{part} = {value} of its normaliser"):
        read_sae(made.write(tmp_path, said, state))


def test_a_normaliser_that_is_not_as_its_configuration_says(tmp_path: Path) -> None:
    said, state = parts()
    said["config"]["normalizer_cfg"]["mu_e"] = 1
    with pytest.raises(WeightsError, match="needs the tensors _mu_e"):
        read_sae(made.write(tmp_path / "missing", said, state))
    said["config"]["normalizer_cfg"] |= {"mu_e": 0, "std_e": 0}
    with pytest.raises(WeightsError, match="no place for: _std_e"):
        read_sae(made.write(tmp_path / "unused", said, state))


def test_a_normaliser_that_was_never_primed_is_refused(tmp_path: Path) -> None:
    said, state = parts()
    for name in state:
        if name.endswith("normalizer._mu_s"):
            state[name] = torch.tensor(float("nan"))
    with pytest.raises(WeightsError):
        read_sae(made.write(tmp_path, said, state))


@pytest.mark.parametrize("gated", [False, True])
def test_a_bias_that_is_subtracted_and_is_not_the_decoders(tmp_path: Path, gated: bool) -> None:
    said, state = parts(gated=gated)
    name = next(name for name in state if name.startswith("models.0") and ".pre_bias." in name)
    with pytest.raises(WeightsError, match="does not subtract its decoder's bias"):
        read_sae(made.write(tmp_path / "other", said, {**state, name: numbers(D, seed=50)}))
    said["config"]["arch_cfg"]["pre_bias"] = False
    with pytest.raises(WeightsError, match="pre_bias is False"):
        read_sae(made.write(tmp_path / "said", said, state))


def test_pre_bias_that_is_no_single_value_is_refused(tmp_path: Path) -> None:
    said, state = parts()
    said["config"]["arch_cfg"]["pre_bias"] = {"values": [True, False]}
    with pytest.raises(WeightsError, match=r"pre_bias is .* not true or false"):
        read_sae(made.write(tmp_path, said, state))


@pytest.mark.parametrize("name", ["models.0.encoder.scale", "losses.L2_loss.model.module.scale"])
def test_a_strange_tensor_is_refused(tmp_path: Path, name: str) -> None:
    said, state = parts()
    with pytest.raises(WeightsError, match="scale"):
        read_sae(made.write(tmp_path, said, {**state, name: numbers(S, seed=51)}))


def test_a_gate_with_an_encoder_of_its_own_is_refused(tmp_path: Path) -> None:
    said, state = parts(gated=True)
    state["models.0.encoder.gate.module.weight.weight"] = numbers(S, D, seed=52)
    with pytest.raises(WeightsError, match="encoder of its own"):
        read_sae(made.write(tmp_path, said, state))


def test_what_writes_activations_of_another_place_is_refused(tmp_path: Path) -> None:
    said, state = parts()
    said["config"]["train_cfg"]["target_sites"] = ["transformer.h.6.input"]  # what it reads
    assert not read_sae(made.write(tmp_path / "same", said, state)).transcoder
    said["config"]["train_cfg"]["target_sites"] = ["transformer.h.7.input"]
    with pytest.raises(WeightsError, match="target_sites"):
        read_sae(made.write(tmp_path / "other", said, state))


def test_names_of_wrappers_say_nothing(tmp_path: Path) -> None:
    """Before 2026-05 the wrappers of decoder and encoder were parts of the names."""
    said, state = parts(gated=True)
    old = {
        name.replace("decoder.", "decoder.wrapped.wrapped.")
        .replace("identity.", "identity.module.module.")
        .replace("weight.weight", "weight.module.module.weight")
        .replace("bias.bias", "bias.wrapped.bias"): value
        for name, value in state.items()
    }
    assert set(old) != set(state)
    new, before = (
        read_sae(made.write(tmp_path / folder, said, one))
        for folder, one in (("new", state), ("old", old))
    )
    assert new.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(new.tensors[name], before.tensors[name]) for name in new.tensors)


def test_the_first_version_of_vanilla_has_no_encoder_bias(tmp_path: Path) -> None:
    said, state = parts()
    state = {name: value for name, value in state.items() if not name.endswith("lin.bias")}
    assert torch.equal(read_sae(made.write(tmp_path, said, state)).b_enc_s, torch.zeros(S))


def test_what_its_files_say_is_recorded(tmp_path: Path) -> None:
    said, state = parts()
    sae = read_sae(made.write(tmp_path / "own", said, state))
    facts = {fact.name: (fact.value, fact.source) for fact in sae.record.facts}
    assert facts["pre_bias"] == (True, "18001.arch_ref")
    assert facts["decoder_norm"] == ("unit", "file")
    assert sae.record.trained_on == {
        "model": "gpt2",
        "hook": "transformer.h.6.input",
        "dataset": "alancooney/sae-monology-pile-uncopyrighted-tokenizer-gpt2",
    }
    W_dec_ds = rows(unit=True).T
    shorter = {name: 0.9 * w if torch.equal(w, W_dec_ds) else w for name, w in state.items()}
    mean = read_sae(made.write(tmp_path / "mean", said, made.averaged(shorter), "avg_weights"))
    norms = {fact.name: fact.value for fact in mean.record.facts}
    assert norms["decoder_norm"] == "free"
    assert mean.record.notes == ()  # a mean of unit vectors is shorter
