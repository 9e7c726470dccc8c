"""What of an image a probe reads: a few tokens at a site made into one vector, or the embedding.

    cls        the CLS token                                       [d]
    mean       the mean of the image's own tokens, patches or grid [d]
    cls+mean   one after the other                                 [2d]
    pooled     a site that is one vector already                   [d]
    embedding  the backbone's final embedding, after the splice    [e]

of the tokens that an SAE covers. Codes are those of the same tokens: of one token as they are, of
several the maximum or the mean of each latent (`pooling`), and for `cls+mean` one after the other.
With `embedding` they are those of the default feature. An image's train and test features are made
by the same functions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from saebench.codes import Codes
from saebench.probe_features import Feature, Pooling
from saebench.task import Batch

CELLS = 1 << 22  # latents of images that are pooled at once


def clean_features(batch: Batch, feature: Feature) -> Tensor:
    """[b f] float32 of the untouched activations: once for all SAEs on the same tokens."""
    if feature.name == "embedding":
        return batch.clean_output.embedding_bd.float()
    return batch.shared(f"feature {feature.name}", lambda: _of_tokens(batch.x_btd, feature))


def reconstructed_features(batch: Batch, feature: Feature) -> Tensor:
    """[b f] float32 of the reconstructions; `embedding`: of the spliced pass.

    Errors: those of `SaeBatch`.
    """
    if feature.name == "embedding":
        return batch.spliced_output("sae_tokens").embedding_bd.float()
    return _of_tokens(batch.recon_btd, feature)


def _of_tokens(x_btd: Tensor, feature: Feature) -> Tensor:
    means = [x_btd[:, part].double().mean(dim=1).float() for part in feature.parts]
    return torch.cat(means, dim=1)


def pooled_codes(batch: Batch, feature: Feature, pooling: Pooling) -> Codes:
    """Codes of b images; of `cls+mean` 2 s latents, those of CLS first. Latents of a row ascend."""
    b, t, s = batch.n_images, batch.n_rows // batch.n_images, max(batch.codes.d_sae, 1)
    size = max(1, CELLS // s)  # images at once
    tiles = [batch.codes[i * t : min(i + size, b) * t] for i in range(0, b, size)]
    parts = [Codes.cat([_pooled(z, t, p, pooling) for z in tiles]) for p in feature.code_parts]
    return parts[0] if len(parts) == 1 else _beside(parts)


def _pooled(codes: Codes, t: int, tokens: slice, pooling: Pooling) -> Codes:
    """Per image and latent the maximum, or the mean, over some of the t tokens.

    A latent that is silent on some token counts as 0 there. All images' latents lie side by side
    in `b s` cells: an encoder fills t times as many, so this costs little beside it.
    """
    b, s = codes.n_rows // t, max(codes.d_sae, 1)
    n_tokens = tokens.stop - tokens.start
    first_b, last_b = (codes.offsets_n1[i::t][:b] for i in (tokens.start, tokens.stop))
    length_b = last_b - first_b
    gap_b = first_b - pad(length_b.cumsum(0), (1, 0))[:-1]  # values of other tokens up to here
    at_m = gap_b.repeat_interleave(length_b)
    at_m += torch.arange(len(at_m), device=codes.device)
    value_m = codes.values_m.index_select(0, at_m)
    cell_m = (s * torch.arange(b, device=codes.device)).repeat_interleave(length_b)
    cell_m += codes.indices_m.index_select(0, at_m)
    if pooling == "mean":
        value_c = (_sums(cell_m, value_m, b * s) / n_tokens).float()
    else:
        value_c = value_m.new_zeros(b * s)
        if (value_m < 0).any():  # 0 is the maximum only where some token is silent
            value_c[cell_m.bincount(minlength=b * s) == n_tokens] = -torch.inf
        value_c.scatter_reduce_(0, cell_m, value_m, "amax")
    return replace(Codes.from_dense(value_c.view(b, s)), d_sae=codes.d_sae)


def _sums(cell_m: Tensor, value_m: Tensor, cells: int) -> Tensor:
    """[cells] float64, each the sum of its values in their order: twice the same, to the bit."""
    if cell_m.device.type != "cpu":
        return _ordered_sums(cell_m, value_m, cells)
    weights_m = value_m.double().numpy()
    return torch.from_numpy(np.bincount(cell_m.numpy(), weights_m, minlength=cells))


def _ordered_sums(cell_m: Tensor, value_m: Tensor, cells: int) -> Tensor:
    """For a GPU, whose own scattered sums have no order."""
    cell_m, order_m = cell_m.sort(stable=True)
    cell_u, count_u = cell_m.unique_consecutive(return_counts=True)
    terms_m = value_m.double()[order_m]
    sums_c = terms_m.new_zeros(cells)
    if len(cell_u):
        sums_c[cell_u] = torch.segment_reduce(terms_m, "sum", lengths=count_u)
    return sums_c


def _beside(parts: list[Codes]) -> Codes:
    """The latents of all parts, one part's after the other's, for each row."""
    rows_m = torch.cat([part.rows_m for part in parts])
    widths = [sum(p.d_sae for p in parts[:i]) for i in range(len(parts))]
    latents_m = torch.cat([p.indices_m + w for p, w in zip(parts, widths, strict=True)])
    order_m = rows_m.argsort(stable=True)
    offsets_n1 = torch.stack([part.offsets_n1 for part in parts]).sum(dim=0)
    return Codes(
        sum(part.d_sae for part in parts),
        offsets_n1,
        latents_m[order_m],
        torch.cat([part.values_m for part in parts])[order_m],
    )
