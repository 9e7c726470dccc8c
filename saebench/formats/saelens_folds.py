"""What SAELens multiplies around the matrices of an SAE, made part of the matrices.

New matrices take their places in `floats` one after the other, so that only one is held twice; the
old ones may be the file's own, mapped, and are never changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.errors import WeightsError
from saebench.formats.containers import read_header, read_safetensors
from saebench.formats.content import Content
from saebench.formats.tensors import weights

WHITENING = "activation_whitening.safetensors"
FINETUNING = ("scaling_factor", "finetuning_scaling_factor")
Tensors = dict[str, Tensor]
_TILE = 256  # rows that are multiplied at once


def times_decoder_norms(floats: Tensors) -> Tensors:
    """pre·‖row of W_dec‖ in place of pre, and rows of length 1."""
    norm_s = floats["W_dec"].norm(dim=1).clamp(min=1e-8)  # as the library guards dead rows
    floats["W_enc"] = floats["W_enc"] * norm_s
    floats["b_enc"] = floats["b_enc"] * norm_s
    floats["W_dec"] = floats["W_dec"] / norm_s[:, None]
    return floats


def of_raw_x(floats: Tensors, whitening: Tensors) -> Tensors:
    """Matrices that read x − mean and write x̂ − mean, of those that know whitened rows."""
    M_dd, back_dd = whitening["matrix"], whitening["inverse_matrix"]
    floats["W_enc"] = _product(floats["W_enc"].T, M_dd.T).T
    floats["W_dec"] = _product(floats["W_dec"], back_dd)
    floats["b_dec"] = _product(floats["b_dec"][None], back_dd)[0]
    return floats


def _product(rows_nd: Tensor, M_dd: Tensor) -> Tensor:
    """rows @ M in float64, where a whole matrix would be twice what it is, so by tiles."""
    M_dd, product_nd = M_dd.double(), torch.empty_like(rows_nd)
    for rows_td, product_td in zip(rows_nd.split(_TILE), product_nd.split(_TILE), strict=True):
        product_td.copy_(rows_td.double() @ M_dd)
    return product_nd


def whitening_of(content: Content, d: int) -> Tensors:
    """mean [d], matrix and inverse_matrix [d d]. Errors: WeightsError (missing, no inverse)."""
    path = content.beside.get(WHITENING)
    if path is None:
        raise WeightsError(
            f"normalize_activations = 'covariance_whitening', and {WHITENING} is not beside it",
            "its run kept it there; the file at the end of the run does not need it",
        )
    read_header(path)
    found = read_safetensors(path)
    names = ("mean", "matrix", "inverse_matrix")
    weights(found, names, what=WHITENING)
    M_dd, back_dd = found["matrix"].double(), found["inverse_matrix"].double()
    if [*M_dd.shape, *back_dd.shape, *found["mean"].shape] != [d] * 5:
        raise WeightsError(f"{WHITENING} is not of {d} dimensions")
    if not torch.allclose(M_dd @ back_dd, torch.eye(d).double(), rtol=0, atol=1e-4):
        raise WeightsError(f"the matrices of {WHITENING} are not inverse to each other")
    return found


def finetuned(floats: Tensors, said: bool, d_sae: int) -> Tensors:
    """Latents are multiplied by a finetuning scale before they are decoded, where there is one.

    `said`: whether cfg.json says so. Errors: WeightsError where the two disagree.
    """
    scales = [floats.pop(name) for name in FINETUNING if name in floats]
    scales = [scale_s for scale_s in scales if not torch.allclose(scale_s, scale_s.new_ones(()))]
    if not scales:  # ones were written for a time, and mean nothing
        return floats
    if not said or len(scales) > 1:
        raise WeightsError(
            "it holds a scaling_factor, and its cfg.json says finetuning_scaling_factor = "
            f"{str(said).lower()}",
            "whether its latents are to be scaled is not known",
        )
    if list(scales[0].shape) != [d_sae]:
        raise WeightsError(f"its scaling_factor has shape {list(scales[0].shape)}")
    floats["W_dec"] = floats["W_dec"] * scales[0][:, None]
    return floats
