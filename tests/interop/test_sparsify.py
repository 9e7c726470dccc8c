"""eai-sparsify's own code writes every kind of file that it can, and saebench reads it alike."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.formats import read_sae
from tests.interop.common import WIDTH, Forward, assert_agree, random_rows, randomised, real_rows

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its Triton decoder needs a GPU
sparsify = pytest.importorskip("sparsify")
pytestmark = pytest.mark.interop

KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk beyond the positive": {"k": 100},
    "square": {"expansion_factor": 1},
    "num_latents": {"num_latents": 96},
    "decoder not normalised": {"normalize_decoder": False},
    "groupmax": {"activation": "groupmax", "k": 16},
    "multi_topk": {"multi_topk": True},
    "transcoder": {"transcode": True},
    "skip transcoder": {"transcode": True, "skip_connection": True},
    "skip": {"skip_connection": True},
}


def written(kind: str, folder: Path) -> Any:
    config = sparsify.SparseCoderConfig(**{"k": 8, "expansion_factor": 2, **KINDS[kind]})
    coder = sparsify.SparseCoder(WIDTH, config)
    randomised(coder)
    if config.normalize_decoder and not config.transcode:
        coder.set_decoder_norm_to_unit_norm()
    coder.save_to_disk(folder)
    return coder


def forward_of(coder: Any) -> Forward:
    def forward(x_nd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = coder(x_nd)
        z_ns = torch.zeros(len(x_nd), coder.num_latents)
        return z_ns.scatter_(1, found.latent_indices, found.latent_acts), found.sae_out

    return forward


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "multi_topk"])
def test_as_its_own_forward(kind: str, tmp_path: Path) -> None:
    coder = written(kind, tmp_path)
    sae = read_sae(tmp_path / "sae.safetensors")
    assert_agree(sae, forward_of(coder))
    assert sae.transcoder == coder.cfg.transcode


def test_multi_topk_is_a_matter_of_training_alone(tmp_path: Path) -> None:
    """Its forward returns the latents of 4k for a loss, and the reconstruction from k."""
    coder = written("multi_topk", tmp_path)
    sae = read_sae(tmp_path / "sae.safetensors")

    def forward(x_nd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        acts, indices, _ = coder.encode(x_nd)
        z_ns = torch.zeros(len(x_nd), coder.num_latents).scatter_(1, indices, acts)
        return z_ns, coder.decode(acts, indices)

    assert_agree(sae, forward)


def test_stored_in_bfloat16_computed_in_float32(tmp_path: Path) -> None:
    coder = written("topk", tmp_path)
    coder.to(torch.bfloat16).save_to_disk(tmp_path)
    sae = read_sae(tmp_path / "sae.safetensors")
    assert sae.stored_dtype == "bfloat16"
    assert_agree(sae, forward_of(coder.float()))


@pytest.mark.parametrize("normalises", [True, False])
def test_sae_lens_reads_these_files_otherwise_and_saebench_as_they_are_written(
    normalises: bool, tmp_path: Path
) -> None:
    """sae-lens 6.54.12 transposes W_dec, whose rows sparsify writes as they are used."""
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    folder = tmp_path / "layers.10"
    coder = written("topk" if normalises else "decoder not normalised", folder)
    sae = read_sae(folder / "sae.safetensors")
    _, state = loaders.sparsify_disk_loader(folder)
    assert state["W_dec"].shape == (WIDTH, sae.d_sae)  # and not [s d]
    assert_agree(sae, forward_of(coder), random_rows(), real_rows())
