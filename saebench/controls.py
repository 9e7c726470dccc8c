"""Controls: coders whose results are known beforehand, to read an SAE's numbers against.

Identity  x̂ = x                                  fvu 0, cosine 1
Zero      x̂ = 0                                  fvu 1 + N‖μ‖²/SS,            SS = Σ‖x − μ‖²
Mean      x̂ = the train mean of the token kind   fvu 1 + N‖μ_train − μ‖²/SS   (within a kind)
Pca       x̂ = the projection on k train axes     fvu on its own data: the discarded variance
random_like, shuffled_decoder                    what an SAE of that shape gets for nothing
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saebench.activations import TopK
from saebench.codes import Codes
from saebench.errors import Mismatch
from saebench.saes import TILE_BYTES, Sae


@dataclass(frozen=True, eq=False)
class Identity:
    """Returns x itself: its d latents are the coordinates."""

    d_model: int
    architecture: str = "identity"
    transcoder: bool = False
    n_bytes: int = 0

    @property
    def d_sae(self) -> int:
        return self.d_model

    @property
    def decoder_norms_s(self) -> Tensor:
        return torch.ones(self.d_model, dtype=torch.float64)

    def encode(self, x_nd: Tensor, *, tile_bytes: int = TILE_BYTES) -> Codes:
        return Codes.from_dense(x_nd)

    def decode(self, codes: Codes) -> Tensor:
        return codes.dense()


@dataclass(frozen=True, eq=False)
class Zero:
    """Returns nothing, and has no latents."""

    d_model: int
    architecture: str = "zero"
    transcoder: bool = False
    d_sae: int = 0
    n_bytes: int = 0

    @property
    def decoder_norms_s(self) -> Tensor:
        return torch.zeros(0, dtype=torch.float64)

    def encode(self, x_nd: Tensor, *, tile_bytes: int = TILE_BYTES) -> Codes:
        return Codes.empty(x_nd.shape[0], 0, x_nd.device)

    def decode(self, codes: Codes) -> Tensor:
        return torch.zeros(codes.n_rows, self.d_model, device=codes.device)


@dataclass(frozen=True, eq=False)
class Mean:
    """Returns the train mean of each token's kind, and has no latents.

    mean_td: that mean for each of the t tokens of an image. Rows are whole images, one after the
    other, so row i is token i mod t.
    """

    mean_td: Tensor
    architecture: str = "mean"
    transcoder: bool = False
    d_sae: int = 0

    @property
    def d_model(self) -> int:
        return self.mean_td.shape[1]

    @property
    def n_bytes(self) -> int:
        return self.mean_td.numel() * self.mean_td.element_size()

    @property
    def decoder_norms_s(self) -> Tensor:
        return torch.zeros(0, dtype=torch.float64, device=self.mean_td.device)

    def encode(self, x_nd: Tensor, *, tile_bytes: int = TILE_BYTES) -> Codes:
        return Codes.empty(x_nd.shape[0], 0, x_nd.device)

    def decode(self, codes: Codes) -> Tensor:
        """Errors: Mismatch where the rows are not whole images."""
        tokens = self.mean_td.shape[0]
        if codes.n_rows % tokens:
            raise Mismatch(f"{codes.n_rows} rows are not whole images of {tokens} tokens")
        return self.mean_td.repeat(codes.n_rows // tokens, 1)


@dataclass(frozen=True, eq=False)
class Pca:
    """Projects on k orthonormal axes basis_dk around mean_d; its codes are the k scores."""

    mean_d: Tensor
    basis_dk: Tensor
    architecture: str = "pca"
    transcoder: bool = False

    @property
    def d_model(self) -> int:
        return self.basis_dk.shape[0]

    @property
    def d_sae(self) -> int:
        return self.basis_dk.shape[1]

    @property
    def n_bytes(self) -> int:
        return 4 * (self.mean_d.numel() + self.basis_dk.numel())

    @property
    def decoder_norms_s(self) -> Tensor:
        return self.basis_dk.double().norm(dim=0)

    def encode(self, x_nd: Tensor, *, tile_bytes: int = TILE_BYTES) -> Codes:
        return Codes.from_dense((x_nd - self.mean_d) @ self.basis_dk)

    def decode(self, codes: Codes) -> Tensor:
        return torch.addmm(self.mean_d, codes.dense(), self.basis_dk.T)


def random_like(
    sae: Sae, *, l0: float, scale: float, mean_d: Tensor, generator: torch.Generator
) -> Sae:
    """An untrained SAE of the same size: unit Gaussian directions, TopK at the measured `l0`.

    x̂ = mean + Σ_top-k a ⟨x − mean, w_j⟩ w_j. `scale` is a; the a of least squares on train rows is
    for the caller to find. The generator is a CPU one, so that every device has the same control.
    """
    directions_sd = torch.randn(sae.d_sae, sae.d_model, generator=generator)
    directions_sd = (directions_sd / directions_sd.norm(dim=1, keepdim=True)).to(sae.device)
    bias_d = mean_d.to(sae.device, torch.float32)
    return Sae(
        W_enc_ds=scale * directions_sd.T,
        b_enc_s=torch.zeros(sae.d_sae, device=sae.device),
        W_dec_sd=directions_sd,
        b_dec_d=bias_d,
        activation=TopK(min(max(1, round(l0)), sae.d_sae)),
        architecture="topk",
        b_pre_d=bias_d,
    )


def shuffled_decoder(sae: Sae, generator: torch.Generator) -> Sae:
    """The same codes, decoded with the decoder's rows in a random order (a CPU generator)."""
    order_s = torch.randperm(sae.d_sae, generator=generator).to(sae.device)
    return replace(sae, W_dec_sd=sae.W_dec_sd[order_s])
