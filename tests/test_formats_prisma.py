"""ViT-Prisma's files: which configuration counts, what it leaves open, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_sae
from saebench.formats.facts import Facts, MissingFacts
from saebench.inputs import LayerNorm
from saebench.specs import SaeSpec
from tests.checkpoints import D, S, inputs
from tests.checkpoints.prisma import (
    CONFIG,
    GATED,
    LEGACY,
    OLD,
    alone,
    as_state,
    beside,
    legacy,
    pickled,
    state,
)
from tests.foreign_classes import foreign
from tests.stated import entry_of

RELU = {**CONFIG, "normalize_activations": "none"}


def asked(path: Path, spec: SaeSpec | None = None) -> set[str]:
    with pytest.raises(MissingFacts) as caught:
        read_sae(path, spec)
    return {one.name for one in caught.value.missing}


def test_the_pickled_configuration_and_config_json_have_to_agree(tmp_path: Path) -> None:
    path = pickled(tmp_path, RELU, state())
    (tmp_path / "config.json").write_text(json.dumps({**RELU, "lr": 0.1, "d_out": 3}))
    assert read_sae(path).scaling.rows is None
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(WeightsError, match=r"normalize_activations = 'none', and config\.json"):
        read_sae(path)
    (tmp_path / "config.json").write_text('{"trainer": {}}')  # of something else
    assert read_sae(path).scaling.rows is None


def test_config_json_completes_a_pickled_configuration(tmp_path: Path) -> None:
    path = pickled(tmp_path, OLD, state())
    assert asked(path) == {"row_norm", "activation"}
    (tmp_path / "config.json").write_text(json.dumps({**RELU, "model_name": "m"}))
    sae = read_sae(path)
    assert sae.scaling.rows is None
    assert sae.record.trained_on["model"] == OLD["model_name"]


def test_a_state_dict_alone_asks_for_everything(tmp_path: Path) -> None:
    path = alone(tmp_path, {}, state())
    assert asked(path, entry_of(path, "prisma")) == {"row_norm", "activation"}
    topk = entry_of(path, "prisma", activation="topk", row_norm="sqrt_d")
    assert asked(path, topk) == {"k"}
    (tmp_path / "config.json").write_text("{}")  # one that says nothing gives no default either
    assert asked(path, entry_of(path, "prisma")) == {"row_norm", "activation"}


def test_topk_without_k_asks(tmp_path: Path) -> None:
    path = beside(tmp_path, {**RELU, "activation_fn_str": "topk"}, state())
    assert asked(path) == {"k"}


@pytest.mark.parametrize("cfg", [{"d_in": D}, {**RELU, "block_layer": -2, "module_name": "resid"}])
def test_a_configuration_that_does_not_tell_whose_it_is(
    cfg: dict[str, Any], tmp_path: Path
) -> None:
    path = pickled(tmp_path, cfg, state())
    with pytest.raises(WeightsError, match=r"could be of several formats.*patchsae, prisma"):
        read_sae(path)
    x_nd = inputs(D)
    given = {} if "activation_fn_str" in cfg else {"activation": "relu", "row_norm": "layer_norm"}
    prisma = read_sae(path, entry_of(path, "prisma", **given))
    other = read_sae(path, entry_of(path, "patchsae"))
    assert torch.equal(prisma.encode(x_nd).dense(), other.encode(x_nd).dense()) == (not given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation_fn_str": "gelu"}, "its activation is 'gelu'"),
        ({"activation_fn_kwargs": [1]}, r"activation_fn_kwargs is \[1\]"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3, "postact_fn": "x"}},
            "no place for: postact_fn",
        ),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 0}}, "k is 0"),
        ({"architecture": "jumprelu"}, "its architecture is 'jumprelu'"),
        ({"architecture": "gated"}, "differ in b_gate, b_mag, r_mag"),
        ({"is_transcoder": True}, "differ in W_skip, b_dec_out"),
        ({"is_transcoder": "no"}, "is_transcoder is 'no'"),
        ({"expansion_factor": 3}, "says 8 x 24, and W_enc is"),
        ({"d_in": 16}, "says 16 x 16, and W_enc is"),
    ],
)
def test_a_configuration_of_another_sae_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=said):
        read_sae(beside(tmp_path, {**RELU, **changes}, state()))


def test_a_gate_before_another_activation_is_refused(tmp_path: Path) -> None:
    words = {"activation_fn_str": "leaky_relu", "architecture": "gated"}
    with pytest.raises(WeightsError, match="known behind a gate"):
        read_sae(beside(tmp_path, {**RELU, **words}, GATED))


def test_names_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    weights = state()
    with pytest.raises(WeightsError, match="no place for: threshold"):
        read_sae(beside(tmp_path, RELU, {**weights, "threshold": weights["b_enc"]}))
    whole = {"cfg": RELU, "state_dict": as_state(weights), "steps": 3}
    torch.save(whole, tmp_path / "more.pt")
    with pytest.raises(WeightsError, match="beside its state dict it holds steps"):
        read_sae(tmp_path / "more.pt")
    flat = {**weights, "W_enc": torch.ones(D * S)}
    with pytest.raises(WeightsError, match=r"W_enc has shape \[128\]"):
        read_sae(beside(tmp_path, RELU, flat))


def test_a_norm_that_the_project_does_not_know_is_none(tmp_path: Path) -> None:
    config = {**RELU, "normalize_activations": "expected_average_only_in"}
    sae = read_sae(beside(tmp_path, config, state()))
    assert sae.scaling.rows is None
    assert "does nothing in ViT-Prisma" in " ".join(sae.record.notes)


def test_what_is_known_is_recorded_and_cannot_be_said_otherwise(tmp_path: Path) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "normalize_activations"}
    path = beside(tmp_path, {**config, "use_patches_only": True}, state())
    record = read_sae(path).record
    facts = {fact.name: (fact.value, fact.source) for fact in record.facts}
    assert facts["row_norm"] == ("layer_norm", "format")
    assert facts["activation"] == ("relu", "config.json")
    assert facts["pre_bias"] == (True, "format")
    assert record.trained_on == {
        "model": CONFIG["model_name"],
        "hook": "blocks.9.hook_resid_post",
        "tokens": "patches",
        "dataset": "imagenet1k",
    }
    with pytest.raises(SpecError, match="row_norm = 'none' is given, and the format says"):
        read_sae(path, facts=Facts({"row_norm": "none"}))


def test_the_hook_of_a_legacy_file_is_the_one_it_says(tmp_path: Path) -> None:
    sae = read_sae(legacy(tmp_path, LEGACY, state()), facts=Facts({"row_norm": "none"}))
    assert sae.record.trained_on["hook"] == "blocks.10.hook_resid_post"
    assert any("hook_mlp_out" in note for note in sae.record.notes)


def test_a_configuration_of_the_model_inside_the_runners(tmp_path: Path) -> None:
    with foreign("vit_prisma.configs.HookedViTConfig.HookedViTConfig", {"n_layers": 12}) as model:
        runner = "vit_prisma_hf.sae_jepa_config.JEPABaseConfig"
        with foreign(runner, {**CONFIG, "vit_model_cfg": model}) as cfg:
            torch.save({"cfg": cfg, "state_dict": state()}, tmp_path / "sae.pt")
    assert isinstance(read_sae(tmp_path / "sae.pt").scaling.rows, LayerNorm)
