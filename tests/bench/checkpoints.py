"""Checkpoints of one SAE in every kind of container and layout, for measurements of loading."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

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


def _runner(sae: Sae) -> dict[str, Any]:
    """What the runners for vision transformers saved of an SAE, in whatever file."""
    cfg = {
        "block_layer": -2,
        "module_name": "resid",
        "d_in": D,
        "expansion_factor": sae.d_sae // D,
    }
    return {"cfg": cfg, "state_dict": sae.tensors}


def _pickle(folder: Path, sae: Sae) -> Path:
    with (folder / "sae.pkl").open("wb") as file:
        pickle.dump(_runner(sae), file)
    return folder / "sae.pkl"


def _gzip(folder: Path, sae: Sae) -> Path:
    """Hardly compressed, which takes little time and as much memory to read."""
    with gzip.open(folder / "sae.pkl.gz", "wb", compresslevel=0) as file:
        pickle.dump(_runner(sae), file)
    return folder / "sae.pkl.gz"


def _legacy(folder: Path, sae: Sae) -> Path:
    torch.save(_runner(sae), folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def _gemma_scope(folder: Path, sae: Sae) -> Path:
    arrays = {name: tensor.numpy() for name, tensor in sae.tensors.items()}
    np.savez(folder / "params.npz", **arrays, threshold=np.ones(sae.d_sae, np.float32))
    return folder / "params.npz"


def _llama_scope(folder: Path, sae: Sae) -> Path:
    """Both matrices as linear layers have them; scaled, and then divided by their rows' lengths."""
    stored = {
        "encoder.weight": sae.W_enc_ds.T.contiguous(),
        "encoder.bias": sae.b_enc_s,
        "decoder.weight": sae.W_dec_sd.T.contiguous(),
        "decoder.bias": sae.b_dec_d,
    }
    config = {
        "norm_activation": "dataset-wise",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.5,
        "sparsity_include_decoder_norm": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "d_model": D,
        "d_sae": sae.d_sae,
        "dataset_average_activation_norm": {"in": 10.0, "out": 10.0},
    }
    (folder / "hyperparams.json").write_text(json.dumps(config))
    save_file(stored, folder / "final.safetensors")
    return folder / "final.safetensors"


def _saelens(dtype: torch.dtype = torch.float32, **changed: Any) -> Callable[[Path, Sae], Path]:
    def write(folder: Path, sae: Sae) -> Path:
        stored = {name: tensor.to(dtype) for name, tensor in sae.tensors.items()}
        config = {
            "architecture": "standard",
            "d_in": D,
            "d_sae": sae.d_sae,
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "sae_lens_version": "6.5.0",
            "metadata": {},
        }
        whitening = {
            "mean": torch.zeros(D),
            "matrix": 2 * torch.eye(D),
            "inverse_matrix": torch.eye(D) / 2,
        }
        (folder / "cfg.json").write_text(json.dumps(config | changed))
        save_file(whitening, folder / "activation_whitening.safetensors")
        save_file(stored, folder / "sae_weights.safetensors")
        return folder / "sae_weights.safetensors"

    return write


LAYOUTS: dict[str, Callable[[Path, Sae], Path]] = {
    "saebench": _native,
    "saev": _saev,
    "dictionary_learning": _transposed,
}
"""Those whose time is measured."""

MORE_LAYOUTS: dict[str, Callable[[Path, Sae], Path]] = {
    "pickle": _pickle,
    "pickle in gzip": _gzip,
    "legacy": _legacy,
    "npz": _gemma_scope,
    "bfloat16": _saelens(torch.bfloat16),
    "float64": _saelens(torch.float64),
    "rescaled": _saelens(architecture="topk", k=32, rescale_acts_by_decoder_norm=True),
    "whitened": _saelens(normalize_activations="covariance_whitening"),
    "llama scope": _llama_scope,
}


def make(s: int) -> Sae:
    generator = torch.Generator().manual_seed(0)
    W_enc_ds = torch.randn(D, s, generator=generator)
    rows_sd = torch.nn.functional.normalize(torch.randn(s, D, generator=generator), dim=1)
    return Sae(W_enc_ds, torch.zeros(s), rows_sd, torch.zeros(D), Threshold(), "relu")


def load(path: Path) -> Sae:
    given = {"input": "raw"} if path.name == "sae.pt" else {}
    return read_content(sniff(path), Facts(given))
