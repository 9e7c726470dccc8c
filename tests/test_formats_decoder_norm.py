"""decoder_norm is measured in the file: a format's promise of unit rows is not taken for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saebench.errors import SpecError
from saebench.formats import read_sae, write_sae
from saebench.formats.facts import Facts
from tests.checkpoints import (
    S,
    dictionary_learning,
    discover_then_name,
    mlsae,
    patchsae,
    prisma,
    rows,
    saev,
    sparsify,
)
from tests.stated import facts_of
from tests.test_saes import D, make
from tests.test_saes import S as LATENTS

Weights = dict[str, Any]
Write = Callable[[Path, Weights], Path]
BATCH_TOP_K = "BatchTopKSAE"
RELU_OF_SAEV = saev.nested(saev.activation("Relu"))


def of_mlsae(folder: Path, weights: Weights) -> Path:
    save_file(weights, folder / "model.safetensors")
    return folder / "model.safetensors"


def of_discover_then_name(folder: Path, weights: Weights) -> Path:
    torch.save(weights, folder / "sparse_autoencoder_final.pt")
    return folder / "sparse_autoencoder_final.pt"


# How each is written, its weights, its decoder and where its latents are.
MADE: dict[str, tuple[Write, Weights, str, int]] = {
    "patchsae": (
        lambda folder, weights: patchsae.as_dict(folder, patchsae.CONFIG, weights),
        *(patchsae.state(), "W_dec", 0),
    ),
    "saev": (
        lambda folder, weights: saev.write(folder, RELU_OF_SAEV, weights),
        *(saev.state(), "W_dec", 0),
    ),
    "prisma": (
        lambda folder, weights: prisma.beside(folder, prisma.CONFIG, weights),
        *(prisma.state(), "W_dec", 0),
    ),
    "sparsify": (
        lambda folder, weights: sparsify.write(folder, sparsify.CONFIG, weights),
        *(sparsify.tensors(S, unit=True, skip=False), "W_dec", 0),
    ),
    "dictionary_learning": (
        lambda folder, weights: dictionary_learning.write(
            folder, weights, dictionary_learning.config_of(BATCH_TOP_K)
        ),
        *(dictionary_learning.tensors_of(BATCH_TOP_K), "decoder.weight", 1),
    ),
    "mlsae": (of_mlsae, mlsae.state(), "decoder.weight", 1),
    "discover-then-name": (
        of_discover_then_name,
        *(discover_then_name.state(), "decoder._weight", 2),
    ),
}
SAID: dict[str, Any] = {"mlsae": {"k": 4, "row_norm": "none"}}


@pytest.mark.parametrize("name", MADE)
def test_unit_rows_are_measured_and_not_believed(name: str, tmp_path: Path) -> None:
    write, weights, decoder, latents = MADE[name]
    said = SAID.get(name, {})
    kept = read_sae(write(tmp_path, weights), facts=Facts(said))
    assert facts_of(kept)["decoder_norm"] == ("unit", "file")
    assert not any("decoder_norm" in note for note in kept.record.notes)
    shape = [-1 if axis == latents else 1 for axis in range(weights[decoder].ndim)]
    stretched = weights[decoder] * torch.linspace(3, 7, S).reshape(shape)
    broken = read_sae(write(tmp_path, {**weights, decoder: stretched}), facts=Facts(said))
    assert facts_of(broken)["decoder_norm"] == ("free", "file")
    assert (
        "its makers' code keeps decoder_norm = unit, and its rows are of length 3 to 7"
        in broken.record.notes
    )


@pytest.mark.parametrize(
    ("length", "found"), [(1.0, "unit"), (1.0009, "unit"), (0.998, "free"), (1.002, "free")]
)
def test_a_thousandth_is_rounding(length: float, found: str, tmp_path: Path) -> None:
    W_dec_sd = rows(LATENTS, unit=True)
    W_dec_sd[3] *= length
    write_sae(replace(make("relu"), W_dec_sd=W_dec_sd), tmp_path / "sae")
    assert facts_of(read_sae(tmp_path / "sae"))["decoder_norm"] == (found, "file")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_unit_rows_stay_so_in_half_precision(dtype: str, tmp_path: Path) -> None:
    W_dec_sd = torch.full((LATENTS, D), D**-0.5)  # every entry is rounded the same way
    write_sae(replace(make("relu"), W_dec_sd=W_dec_sd), tmp_path / "sae", dtype=dtype)
    sae = read_sae(tmp_path / "sae")
    assert facts_of(sae)["decoder_norm"] == ("unit", "file")
    assert sae.W_dec_sd.norm(dim=1).min() != 1.0


def test_what_is_measured_may_be_repeated_and_not_denied(tmp_path: Path) -> None:
    write_sae(make("relu"), tmp_path / "sae")
    repeated = read_sae(tmp_path / "sae", facts=Facts({"decoder_norm": "free"}))
    assert facts_of(repeated)["decoder_norm"] == ("free", "file")
    with pytest.raises(SpecError, match="'unit' is given, and the file says 'free'"):
        read_sae(tmp_path / "sae", facts=Facts({"decoder_norm": "unit"}))
