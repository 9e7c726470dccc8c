"""Matching pursuit: a code found step by step, each latent by what the earlier ones left over.

    r ← x
    k times:   j = argmax_j r·D_j      the largest, not the largest by magnitude
               z_j ← z_j + r·D_j       a latent that is taken again adds up
               r ← r − (r·D_j) D_j

and orthogonal matching pursuit, which weighs all latents anew at each step and takes none again:

    k times:   J ← J ∪ argmax_{j ∉ J} r·D_j
               z_J ← argmin_{z ≥ 0} ‖x − z @ D_J‖²
               r ← x − z_J @ D_J

D [s d] is the decoder. Mallat and Zhang 1993, "Matching pursuits with time-frequency dictionaries";
Pati et al. 1993, "Orthogonal matching pursuit". As SAEs in overcomplete: `MpSAE`, whose values can
be negative where all r·D_j are, and `OMPSAE`, which stops short of that minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

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


@dataclass(frozen=True, eq=False)
class OrthogonalMatchingPursuit:
    """k latents of the dictionary D [s d], from pre = x @ D.T.

    `max_iter` steps of projected gradient descent, of length 1 / ‖D_J @ D_J.T‖ (Frobenius), follow
    each latent from where the last ones ended. overcomplete takes 10 of them, with which its codes
    are still on their way; that it stops earlier where the slope of a whole batch is below 1e-5
    is not followed, so that no row depends on others.
    """

    k: int
    max_iter: int
    dictionary_sd: Tensor  # the decoder itself

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    def codes(self, pre_ns: Tensor) -> Codes:
        D_sd, n = self.dictionary_sd, pre_ns.shape[0]
        taken_nk = torch.zeros(n, self.k, dtype=torch.int64, device=pre_ns.device)
        z_nk, pre_nk = pre_ns.new_zeros(2, n, self.k)  # zero where none is taken yet
        gram_nkk = pre_ns.new_zeros(n, self.k, self.k)
        left_ns = pre_ns
        for step in range(self.k):
            latent_n = left_ns.scatter(1, taken_nk[:, :step], -torch.inf).argmax(dim=1)
            taken_nk[:, step] = latent_n
            so_far_nj = taken_nk[:, : step + 1]
            overlap_nj = (D_sd[latent_n] @ D_sd.T).gather(1, so_far_nj)
            gram_nkk[:, step, : step + 1] = gram_nkk[:, : step + 1, step] = overlap_nj
            pre_nk[:, step] = pre_ns.gather(1, latent_n[:, None])[:, 0]
            z_nk = self._weighed(pre_nk, gram_nkk, z_nk)
            xhat_nd = embedding_bag(taken_nk, D_sd, per_sample_weights=z_nk, mode="sum")
            left_ns = torch.addmm(pre_ns, xhat_nd, D_sd.T, alpha=-1)
        return Codes.from_topk(z_nk, taken_nk, pre_ns.shape[1])

    def _weighed(self, pre_nk: Tensor, gram_nkk: Tensor, z_nk: Tensor) -> Tensor:
        """What the latents that are taken weigh, not below zero, from z [n k]."""
        length_n1 = 1 / (gram_nkk.flatten(1).norm(dim=1, keepdim=True) + 1e-8)
        for _ in range(self.max_iter):
            slope_nk = torch.einsum("nij,nj->ni", gram_nkk, z_nk) - pre_nk
            z_nk = (z_nk - length_n1 * slope_nk).relu()
        return z_nk
