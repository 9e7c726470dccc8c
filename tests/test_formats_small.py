"""Discover-then-Name, mlsae, Gemma Scope and Goodfire: what each refuses and asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_content, read_sae
from saebench.formats.content import sniff
from saebench.formats.facts import Facts
from tests.checkpoints import D, S, language, mlsae, numbers
from tests.checkpoints import discover_then_name as dn


def torch_file(folder: Path, content: dict[str, Any]) -> Path:
    torch.save(content, folder / "a.pt")
    return folder / "a.pt"


# --- Discover-then-Name -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pre_encoder_bias", "post_decoder_bias"])
def test_the_tied_bias_is_one(name: str, tmp_path: Path) -> None:
    changed = {**dn.state(), f"{name}._bias_reference": numbers(1, D, seed=77)}
    with pytest.raises(WeightsError, match=f"{name}._bias_reference is not the tied_bias"):
        read_sae(torch_file(tmp_path, changed))


def test_several_components_are_refused(tmp_path: Path) -> None:
    doubled = {name: torch.cat([tensor] * 2) for name, tensor in dn.state().items()}
    with pytest.raises(WeightsError, match="not one component"):
        read_sae(torch_file(tmp_path, doubled))


def test_a_strange_tensor_of_discover_then_name(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no place for: gate"):
        read_sae(torch_file(tmp_path, {**dn.state(), "gate": torch.zeros(1, S)}))


# --- mlsae --------------------------------------------------------------------------------------


def hub(folder: Path, **changes: Any) -> Path:
    save_file(mlsae.state(), folder / "model.safetensors")
    config = {**mlsae.config(S, 12, standardize=True), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


def test_mlsae_says_what_it_is(tmp_path: Path) -> None:
    sae = read_sae(hub(tmp_path))
    assert any("all layers" in note for note in sae.record.notes)
    assert {fact.name: fact.source for fact in sae.record.facts}["k"] == "config.json"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 0}, "k is 0"),
        ({"standardize": 1}, "standardize is 1"),
        ({"n_inputs": 9}, "n_inputs 9"),
        ({"n_latents": 9}, "n_latents 9"),
    ],
)
def test_a_configuration_of_mlsae_that_does_not_fit(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=said):
        read_sae(hub(tmp_path, **change))


# --- Gemma Scope --------------------------------------------------------------------------------


def npz(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **arrays)  # type: ignore[arg-type]
    return folder / "params.npz"


def test_a_pre_activation_at_the_threshold_is_not_active(tmp_path: Path) -> None:
    arrays = {"W_enc": np.eye(D), "W_dec": np.eye(D), "b_enc": np.zeros(D), "b_dec": np.zeros(D)}
    path = npz(tmp_path, {**arrays, "threshold": np.full(D, 0.5)})
    x_nd = torch.full((3, D), 0.5) * torch.tensor([0.5, 1, 1.5])[:, None]
    sae = read_sae(path)
    assert sae.encode(x_nd).l0_n().tolist() == [0, 0, D]
    assert sae.stored_dtype == "float64"


def test_gemma_s_embedding_saes_ask_for_their_scale(tmp_path: Path) -> None:
    path = npz(tmp_path / "embedding/width_4k/average_l0_6", language.gemma())
    with pytest.raises(SpecError, match="√d"):
        read_sae(path)
    assert read_content(sniff(path), Facts({"input": "raw"})).scaling.scale == 1.0


def test_a_gemma_transcoder_can_be_said_to_be_one(tmp_path: Path) -> None:
    path = npz(tmp_path / "layer_3", language.gemma())
    assert not read_sae(path).transcoder
    assert read_content(sniff(path), Facts({"transcoder": True})).transcoder


@pytest.mark.parametrize("folder", ["layer_3", "gemma-scope-2b-pt-transcoders"])
@pytest.mark.parametrize("said", ["true", "yes please", 1, 0, [True]])
def test_what_is_no_truth_value_does_not_say_whether_it_is_a_transcoder(
    folder: str, said: object, tmp_path: Path
) -> None:
    path = npz(tmp_path / folder, language.gemma())
    with pytest.raises(SpecError, match="transcoder has to be true or false"):
        read_content(sniff(path), Facts({"transcoder": said}))


def test_none_says_nothing(tmp_path: Path) -> None:
    path = npz(tmp_path / "gemma-scope-2b-pt-transcoders", language.gemma())
    assert read_content(sniff(path), Facts({"transcoder": None})).transcoder
    path = npz(tmp_path / "embedding/width_4k/average_l0_6", language.gemma())
    with pytest.raises(SpecError, match="does not say: input"):
        read_content(sniff(path), Facts({"input": None}))


def test_a_strange_array_of_gemma_scope(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no place for: scaling_factor"):
        read_sae(npz(tmp_path, {**language.gemma(), "scaling_factor": np.ones(D)}))


# --- Goodfire -----------------------------------------------------------------------------------


def test_a_strange_tensor_of_goodfire(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no place for: k"):
        read_sae(torch_file(tmp_path, {**language.goodfire(), "k": torch.ones(1)}))
