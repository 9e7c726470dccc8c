"""Checkpoints of one SAE as three projects lay it out, for measurements of loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from saebench.activations import Threshold
from saebench.formats import read_content, write_sae
from saebench.formats.content import sniff
from saebench.formats.facts import Facts
from saebench.saes import Sae

D = 768


def _native(folder: Path, sae: Sae) -> Path:
    write_sae(sae, folder / "sae.safetensors")
    return folder / "sae.safetensors"


def _saev(folder: Path, sae: Sae) -> Path:
    """A line of JSON, then an archive: nothing in it is aligned."""
    line = {"d_vit": D, "exp_factor": sae.d_sae // D, "seed": 42, "normalize_w_dec": True}
    with (folder / "sae.pt").open("wb") as file:
        file.write(json.dumps(line).encode() + b"\n")
        torch.save(sae.tensors, file)
    return folder / "sae.pt"


def _transposed(folder: Path, sae: Sae) -> Path:
    """dictionary_learning's AutoEncoder: both matrices as torch's linear layers have them."""
    stored = {
        "bias": sae.b_dec_d,
        "encoder.weight": sae.W_enc_ds.T.contiguous(),
        "encoder.bias": sae.b_enc_s,
        "decoder.weight": sae.W_dec_sd.T.contiguous(),
    }
    torch.save(stored, folder / "ae.pt")
    return folder / "ae.pt"


LAYOUTS: dict[str, Callable[[Path, Sae], Path]] = {
    "saebench": _native,
    "saev": _saev,
    "dictionary_learning": _transposed,
}


def make(s: int) -> Sae:
    generator = torch.Generator().manual_seed(0)
    W_enc_ds = torch.randn(D, s, generator=generator)
    rows_sd = torch.nn.functional.normalize(torch.randn(s, D, generator=generator), dim=1)
    return Sae(W_enc_ds, torch.zeros(s), rows_sd, torch.zeros(D), Threshold(), "relu")


def load(path: Path) -> Sae:
    given = {"input": "raw"} if path.name == "sae.pt" else {}
    return read_content(sniff(path), Facts(given))
