"""overcomplete's own modules save their state dicts, and saebench gives what they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_sae
from saebench.formats.facts import Facts
from saebench.saes import Sae
from tests.interop.common import WIDTH, assert_agree, random_rows, randomised
from tests.interop.overcomplete_modules import CLASSES, S, forward_of, made, overcomplete, said_of

pytestmark = pytest.mark.interop

MODES = ("l2", "max_l2", "l1", "max_l1", "identity")


def saved(sae: Any, folder: Path, *, in_use: bool = True, **said: Any) -> Sae:
    """What is read of its state dict; `in_use`: the dictionary is normalised before it is saved."""
    if in_use:
        sae.eval()
    torch.save(sae.state_dict(), folder / "sae.pth")
    return read_sae(folder / "sae.pth", facts=Facts(said))


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_as_its_own_forward(name: str, tmp_path: Path) -> None:
    sae = made(name)
    ours = saved(sae, tmp_path, **said_of(name, sae))
    assert_agree(ours, forward_of(sae))


def test_no_class_is_forgotten() -> None:
    sae = overcomplete.SAE
    exported = {
        name
        for name, one in vars(overcomplete).items()
        if isinstance(one, type) and issubclass(one, sae)
    }
    assert exported == {*CLASSES, "QSAE"}


@pytest.mark.parametrize("name", ["TopKSAE", "JumpSAE", "MpSAE", "OMPSAE"])
def test_as_many_latents_as_dimensions(name: str, tmp_path: Path) -> None:
    sae = made(name, WIDTH)
    assert_agree(saved(sae, tmp_path, **said_of(name, sae)), forward_of(sae))


@pytest.mark.parametrize("name", ["TopKSAE", "JumpSAE", "BatchTopKSAE"])
@pytest.mark.parametrize("encoder", ["linear", "mlp_bn_1", "mlp_ln_1", "mlp_bn_3", "mlp_ln_3"])
def test_every_encoder(encoder: str, name: str, tmp_path: Path) -> None:
    sae = made(name, encoder_module=encoder)
    said = said_of(name, sae)
    if encoder.endswith("3"):
        said = {**said, "residual": False}
    assert_agree(saved(sae, tmp_path, **said), forward_of(sae))


@pytest.mark.parametrize("hidden", [None, 40])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("encoder", ["mlp_bn_3", "mlp_ln_3"])
def test_residual_encoders(
    encoder: str, residual: bool, hidden: int | None, tmp_path: Path
) -> None:
    factory = pytest.importorskip("overcomplete.sae.factory").EncoderFactory
    module = factory.create_module(encoder, WIDTH, S, residual=residual, hidden_dim=hidden)
    sae = made("TopKSAE", encoder_module=module)
    ours = saved(sae, tmp_path, residual=residual, **said_of("TopKSAE", sae))
    assert_agree(ours, forward_of(sae))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["tied", "untied"])
@pytest.mark.parametrize("name", ["TopKSAE", "RATopKSAE", "JumpSAE"])
def test_tied_and_untied(name: str, how: str, bias: bool, tmp_path: Path) -> None:
    sae = made(name)
    getattr(sae, how)(bias=bias)
    randomised(sae, seed=3)
    assert_agree(saved(sae, tmp_path, **said_of(name, sae)), forward_of(sae))


@pytest.mark.parametrize("multiplier", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_every_normalisation_in_use_and_one_step_behind(
    mode: str, multiplier: bool, tmp_path: Path
) -> None:
    params = {"normalization": mode, "use_multiplier": multiplier}
    sae = made("TopKSAE", dictionary_params=params)
    said = said_of("TopKSAE", sae)
    behind = saved(sae, tmp_path, in_use=False, dictionary_norm=mode, **said)
    assert_agree(behind, forward_of(sae))
    if mode == "identity":
        with pytest.raises(SpecError, match="dictionary_norm"):
            saved(sae, tmp_path, **said)
    else:
        in_use = saved(sae, tmp_path, **said)
        found = {fact.name: fact.value for fact in in_use.record.facts}["dictionary_norm"]
        assert found == mode
        assert_agree(in_use, forward_of(sae))


@pytest.mark.parametrize("delta", [0.5, 2.0])
def test_an_archetypal_dictionary_one_step_behind(delta: float, tmp_path: Path) -> None:
    sae = made("RATopKSAE", delta=delta)
    said = said_of("RATopKSAE", sae)
    assert_agree(saved(sae, tmp_path, in_use=False, delta=delta, **said), forward_of(sae))


def test_pursuit_takes_atoms_again(tmp_path: Path) -> None:
    sae = made("MpSAE", WIDTH)
    sae.k = WIDTH
    ours = saved(sae, tmp_path, activation="matching_pursuit", k=WIDTH)
    assert (ours.encode(random_rows()).l0_n() < WIDTH).all()
    assert_agree(ours, forward_of(sae))


@pytest.mark.parametrize("max_iter", [1, 10, 50])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_orthogonal_pursuit_as_far_as_its_steps_take_it(
    k: int, max_iter: int, tmp_path: Path
) -> None:
    sae = made("OMPSAE")
    sae.k, sae.max_iter = k, max_iter
    said = {**said_of("OMPSAE", sae), "k": k, "max_iter": max_iter}
    assert_agree(saved(sae, tmp_path, **said), forward_of(sae))


def test_which_pursuit_it_is_nothing_but_what_is_said_tells(tmp_path: Path) -> None:
    """An OMPSAE that is said to be an MpSAE is one."""
    orthogonal, plain = made("OMPSAE"), made("MpSAE")
    plain.load_state_dict(orthogonal.state_dict())
    plain.train()  # which a dictionary has to be in before it can be evaluated
    assert orthogonal.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(SpecError, match=r"MpSAE matching_pursuit, OMPSAE orthogonal"):
        saved(orthogonal, tmp_path)
    ours = saved(orthogonal, tmp_path, **said_of("MpSAE", plain))
    assert_agree(ours, forward_of(plain))
    with pytest.raises(AssertionError):
        assert_agree(ours, forward_of(orthogonal))


@pytest.mark.parametrize("encoder", ["linear", "mlp_ln_3"])
@pytest.mark.parametrize("name", ["MpSAE", "OMPSAE"])
def test_a_pursuit_does_not_use_its_encoder(name: str, encoder: str, tmp_path: Path) -> None:
    sae = made(name, encoder_module=encoder)
    assert_agree(saved(sae, tmp_path, **said_of(name, sae)), forward_of(sae))


@pytest.mark.parametrize("norm", ["BatchNorm1d", "LayerNorm"])
@pytest.mark.parametrize("blocks", [0, 2, 4])
def test_encoders_of_any_depth(blocks: int, norm: str, tmp_path: Path) -> None:
    norm_layer = getattr(torch.nn, norm)
    module = overcomplete.MLPEncoder(WIDTH, S, 40, nb_blocks=blocks, norm_layer=norm_layer)
    sae = made("TopKSAE", encoder_module=module)
    said = said_of("TopKSAE", sae) | ({"residual": False} if blocks > 2 else {})
    assert_agree(saved(sae, tmp_path, **said), forward_of(sae))


@pytest.mark.parametrize("name", ["RATopKSAE", "RAJumpSAE"])
def test_an_archetypal_dictionary_without_a_multiplier(name: str, tmp_path: Path) -> None:
    sae = made(name, use_multiplier=False)
    assert_agree(saved(sae, tmp_path, **said_of(name, sae)), forward_of(sae))


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    quantised = pytest.importorskip("overcomplete.sae.qsae").QSAE(WIDTH, S)
    with pytest.raises(WeightsError, match="QSAE"):
        saved(quantised, tmp_path)
    attention = overcomplete.SAE((4, WIDTH), S, encoder_module="attention_1b")
    with pytest.raises(WeightsError, match="attention encoder"):
        saved(attention, tmp_path, activation="relu")
    resnet = overcomplete.SAE((WIDTH, 4, 4), S, encoder_module="resnet_1b")
    with pytest.raises(WeightsError, match="convolutional encoder"):
        saved(resnet, tmp_path, activation="relu")


def test_a_module_saved_whole_is_not_run(tmp_path: Path) -> None:
    torch.save(made("TopKSAE"), tmp_path / "sae.pt")
    with pytest.raises(WeightsError, match="needs code"):
        read_sae(tmp_path / "sae.pt")
