"""dictionary_learning's own code writes files of all its classes, and saebench reads them alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saebench.formats import read_sae
from tests.interop.common import (
    WIDTH,
    Forward,
    assert_agree,
    assert_close,
    random_rows,
    randomised,
    real_rows,
)

dictionary_learning = pytest.importorskip("dictionary_learning")
pytestmark = pytest.mark.interop

K, GROUPS = 16, [32, 32, 64]
CLASSES = {
    "AutoEncoder": ("dictionary", ()),
    "AutoEncoderNew": ("dictionary", ()),
    "GatedAutoEncoder": ("dictionary", ()),
    "JumpReluAutoEncoder": ("dictionary", ()),
    "AutoEncoderTopK": ("trainers.top_k", (K,)),
    "BatchTopKSAE": ("trainers.batch_top_k", (K,)),
    "MatryoshkaBatchTopKSAE": ("trainers.matryoshka_batch_top_k", (K, GROUPS)),
}
every_class = pytest.mark.parametrize("name", CLASSES)


def module(path: str) -> Any:
    return pytest.importorskip(f"dictionary_learning.{path}")


def made(name: str) -> Any:
    """A dictionary of the class, every number of it seeded."""
    path, more = CLASSES[name]
    dictionary = getattr(module(path), name)(WIDTH, 128, *more)
    randomised(dictionary)
    if isinstance(getattr(dictionary, "threshold", None), torch.nn.Parameter):
        dictionary.threshold.data.copy_(torch.linspace(-0.5, 2, 128))
    elif hasattr(dictionary, "threshold"):
        dictionary.threshold.fill_(0.8)
    return dictionary


def saved(dictionary: Any, folder: Path) -> Path:
    """As `trainSAE` leaves it."""
    name = type(dictionary).__name__
    torch.save({k: v.cpu() for k, v in dictionary.state_dict().items()}, folder / "ae.pt")
    trainer = {"dict_class": name} | ({"k": K} if hasattr(dictionary, "k") else {})
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder / "ae.pt"


def forward_of(dictionary: Any) -> Forward:
    def forward(x_nd: Tensor) -> tuple[Tensor, Tensor]:
        z_ns = dictionary.encode(x_nd)
        return z_ns, dictionary.decode(z_ns)

    return forward


def subclasses(base: type) -> set[str]:
    return {one.__name__ for one in base.__subclasses__()}


def test_no_class_and_no_trainer_is_forgotten() -> None:
    """IdentityDict has no weights."""
    for name in TRAINERS:
        module(f"trainers.{name.partition('.')[0]}")
    assert subclasses(module("dictionary").Dictionary) == {*CLASSES, "IdentityDict"}
    trainers = {name.partition(".")[2] for name in TRAINERS}
    assert subclasses(module("trainers.trainer").SAETrainer) == trainers


@every_class
def test_as_its_own_forward(name: str, tmp_path: Path) -> None:
    dictionary = made(name)
    sae = read_sae(saved(dictionary, tmp_path))
    assert_agree(sae, forward_of(dictionary))


@every_class
def test_as_its_own_loader(name: str, tmp_path: Path) -> None:
    """Reconstructions alone: the loader of AutoEncoder rescales latents to unit decoder columns."""
    path = saved(made(name), tmp_path)
    dictionary, _ = module("utils").load_dictionary(str(tmp_path), "cpu")
    sae = read_sae(path)
    for x_nd in (random_rows(), real_rows()):
        with torch.no_grad():
            theirs_nd = dictionary(x_nd)
        assert_close(sae.decode(sae.encode(x_nd)), theirs_nd)


def test_a_threshold_that_was_never_set(tmp_path: Path) -> None:
    dictionary = made("BatchTopKSAE")
    dictionary.threshold.fill_(-1.0)
    assert_agree(read_sae(saved(dictionary, tmp_path)), forward_of(dictionary))


def rows_without_end() -> Iterator[Tensor]:
    seed = 0
    while True:
        seed += 1
        yield 3.0 * random_rows(64, seed=seed)


RAMP = {"sparsity_warmup_steps": 2}
ANNEALED = {**RAMP, "anneal_start": 3, "n_sparsity_updates": 2, "p_end": 0.2}
TRAINERS = {
    "standard.StandardTrainer": RAMP,
    "standard.StandardTrainerAprilUpdate": RAMP,
    "p_anneal.PAnnealTrainer": ANNEALED,
    "gdm.GatedSAETrainer": RAMP,
    "gated_anneal.GatedAnnealTrainer": ANNEALED,
    "jumprelu.JumpReluTrainer": RAMP,
    "top_k.TopKTrainer": {"k": K},
    "batch_top_k.BatchTopKTrainer": {"k": K},
    "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer": {
        "k": K,
        "group_fractions": [0.25, 0.25, 0.5],
    },
}


@pytest.mark.parametrize("name", TRAINERS)
def test_what_a_run_with_normalised_activations_leaves(name: str, tmp_path: Path) -> None:
    """Finished files and those under checkpoints/ are of raw x: the library rescales both."""
    where, _, trainer = name.partition(".")
    options = {
        "trainer": getattr(module(f"trainers.{where}"), trainer),
        "activation_dim": WIDTH,
        "dict_size": 128,
        "layer": 2,
        "lm_name": "none",
        "device": "cpu",
        "seed": 0,
        "steps": 6,
        "warmup_steps": 2,
        **TRAINERS[name],
    }
    module("training").trainSAE(
        rows_without_end(),
        [options],
        steps=6,
        save_steps=[3],
        save_dir=str(tmp_path),
        normalize_activations=True,
        device="cpu",
    )
    folder = tmp_path / "trainer_0"
    config = json.loads((folder / "config.json").read_text())["trainer"]
    for path in (folder / "ae.pt", folder / "checkpoints" / "ae_3.pt"):
        dictionary = made(config["dict_class"])
        dictionary.load_state_dict(torch.load(path, weights_only=True))
        assert_agree(read_sae(path), forward_of(dictionary))
