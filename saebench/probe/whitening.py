"""What a step of the solver is measured by: the curvature of the loss where rows are taken alike.

With Σ = x̃ᵀx̃/n = U diag(e) Uᵀ and α_k the mean over rows of p_k (1 − p_k), the Hessian is close to
α_k Σ + λ I for the weights of class k, and to α_k for its bias. At W = 0 with classes of equal size
it is this exactly, up to what all classes share. The penalty is in it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.probe.rows import Rows

SAMPLE = 4096  # rows, that Σ is taken from


@dataclass(frozen=True, eq=False)
class Whitening:
    """e_d and U_dd of Σ; U is None where d is too large, and then Σ is taken to be 1."""

    e_d: Tensor
    U_dd: Tensor | None

    @classmethod
    def of(cls, rows: Rows) -> Whitening:
        covariance_dd = rows.covariance(max(SAMPLE, 4 * rows.d))
        if covariance_dd is None:
            return cls(torch.ones(rows.d, dtype=rows.dtype, device=rows.device), None)
        # In float64: LAPACK's float32 gives up on some matrices of low rank, as of few images.
        e_d, U_dd = torch.linalg.eigh(covariance_dd.double())
        return cls(e_d.clamp_min(0).to(rows.dtype), U_dd.to(rows.dtype))

    def curvature(self, alpha_c: Tensor, penalty: float) -> Tensor:
        """[d + 1, c]: of the weights along U, then of the biases."""
        return torch.cat([self.e_d.unsqueeze(1) * alpha_c + penalty, alpha_c.unsqueeze(0)])

    def divide(self, gradient: Tensor, curvature: Tensor) -> Tensor:
        """The gradient [d + 1, c] over the curvature: a Newton step, were it the Hessian."""
        if self.U_dd is None:
            return gradient / curvature
        along = torch.empty_like(gradient)
        torch.mm(self.U_dd.T, gradient[:-1], out=along[:-1])
        along[-1] = gradient[-1]
        along /= curvature
        along[:-1] = self.U_dd @ along[:-1]
        return along
