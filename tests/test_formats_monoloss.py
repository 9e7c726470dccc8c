"""MonoLoss: its four models, its inputs of length 1, and what only its configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_content, read_sae, write_sae
from saebench.formats.content import sniff
from saebench.formats.facts import Facts
from saebench.inputs import InTurn, LayerNorm, Length
from tests.checkpoints import S, inputs
from tests.checkpoints.monoloss import config, state, wrapper


def saved(folder: Path, content: dict[str, Any]) -> Path:
    torch.save(content, folder / "autoencoder_final.pt")
    return folder / "autoencoder_final.pt"


def one(folder: Path, kind: str, *, normalize: bool = False, **given: Any) -> Any:
    path = saved(folder, wrapper(kind, state(kind), normalize=normalize))
    return read_content(sniff(path), Facts(given))


def test_codes_do_not_depend_on_the_length_of_a_row(tmp_path: Path) -> None:
    sae, x_nd = one(tmp_path, "vanilla"), inputs()
    codes, longer = sae.encode(x_nd), sae.encode(3 * x_nd)
    torch.testing.assert_close(longer.dense(), codes.dense())
    torch.testing.assert_close(sae.decode(longer), 3 * sae.decode(codes))


def test_the_norms_in_turn_are_undone_and_kept_in_our_own_format(tmp_path: Path) -> None:
    sae, x_nd = one(tmp_path, "topk", normalize=True), inputs()
    assert sae.scaling.rows == InTurn(Length(1.0), LayerNorm())
    u_nd, frame = sae.scaling.rows(x_nd)
    torch.testing.assert_close(frame.undo(u_nd), x_nd, rtol=1e-3, atol=1e-3)  # but for eps
    write_sae(sae, tmp_path / "ours")
    back = read_sae(tmp_path / "ours")
    assert torch.equal(back.decode(back.encode(x_nd)), sae.decode(sae.encode(x_nd)))


def test_the_norms_in_turn_compose_whichever_comes_first() -> None:
    x_nd = inputs()
    for rows in (InTurn(LayerNorm(1e-9), Length(2.0)), InTurn(LayerNorm(1e-9), LayerNorm(1e-9))):
        u_nd, frame = rows(x_nd)
        torch.testing.assert_close(frame.undo(u_nd), x_nd, rtol=1e-4, atol=1e-4)


def test_batch_topk_needs_a_threshold_and_says_what_its_makers_do(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="threshold") as caught:
        one(tmp_path, "batch_topk")
    assert "saebench estimate" in caught.value.hint
    sae = one(tmp_path, "batch_topk", threshold=0.25)
    assert not sae.b_enc_s.any()
    assert sae.architecture == "batchtopk"
    assert any("top k·B of each batch" in note for note in sae.record.notes)
    assert {fact.name: fact.value for fact in sae.record.facts}["k"] == 12


def test_the_dataset_is_what_it_was_trained_on(tmp_path: Path) -> None:
    assert one(tmp_path, "vanilla").record.trained_on == {"dataset": "/data/imagenet_lmdb"}


@pytest.mark.parametrize("kind", ["topk", "vanilla"])
def test_a_bare_state_dict_is_its_own_by_the_configuration_beside_it(
    kind: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, state(kind))
    with pytest.raises(WeightsError):
        read_sae(path)
    (tmp_path / "training_config.json").write_text(json.dumps(config(kind, normalize=True)))
    sae = read_sae(path)
    assert sae.record.format == "monoloss"
    sources = {fact.name: fact.source for fact in sae.record.facts}
    assert sources["row_norm"] == "training_config.json"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gated"}, "said to be 'gated'"),
        ({"model_type": "jumprelu"}, "said to be 'jumprelu'"),
        ({"normalize": "yes"}, "normalize is 'yes', not true or false"),
        ({"input_unit_norm": True}, "they differ"),
    ],
)
def test_a_configuration_that_is_not_known_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    content = wrapper("vanilla", state("vanilla"), normalize=False)
    content["config"] |= change
    with pytest.raises(WeightsError, match=said):
        read_sae(saved(tmp_path, content))


def test_without_its_configuration_the_layer_norm_is_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, state("jumprelu"))
    with pytest.raises(SpecError, match="row_norm"):
        read_sae(path)
    sae = read_content(sniff(path), Facts({"row_norm": "layer_norm"}))
    assert sae.scaling.rows == InTurn(Length(1.0), LayerNorm())


@pytest.mark.parametrize("kind", ["topk", "vanilla", "jumprelu"])
def test_an_unknown_tensor_is_refused(kind: str, tmp_path: Path) -> None:
    content = wrapper(kind, {**state(kind), "gate": torch.zeros(S)}, normalize=False)
    with pytest.raises(WeightsError, match="no place for: gate"):
        read_sae(saved(tmp_path, content))
