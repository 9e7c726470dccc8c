"""Matching pursuit: a code found step by step, each latent by what the earlier ones left over.

    r ← x
    k times:   j = argmax_j r·D_j      the largest, not the largest by magnitude
               z_j ← z_j + r·D_j       a latent that is taken again adds up
               r ← r − (r·D_j) D_j

D [s d] is the decoder. Mallat and Zhang 1993, "Matching pursuits with time-frequency dictionaries";
as an SAE in overcomplete (`MpSAE`), whose values can be negative where all r·D_j are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.codes import Codes


@dataclass(frozen=True, eq=False)
class MatchingPursuit:
    """k steps over the dictionary D [s d], from pre = x @ D.T.

    What the steps took from x, t [n d], is kept in place of r, which is not known here:
    r @ D.T = pre − t @ D.T. No D @ D.T [s s] is built.
    """

    k: int
    dictionary_sd: Tensor  # the decoder itself, so that it is no tensor of its own

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    def codes(self, pre_ns: Tensor) -> Codes:
        D_sd = self.dictionary_sd
        z_ns = torch.zeros_like(pre_ns)
        taken_nd = D_sd.new_zeros(pre_ns.shape[0], D_sd.shape[1])
        left_ns = pre_ns
        for step in range(self.k):
            if step:
                left_ns = torch.addmm(pre_ns, taken_nd, D_sd.T, alpha=-1)
            value_n, latent_n = left_ns.max(dim=1)
            z_ns.scatter_add_(1, latent_n[:, None], value_n[:, None])
            taken_nd.addcmul_(value_n[:, None], D_sd[latent_n])
        return Codes.from_dense(z_ns)
