"""What a step of the solver is measured by: approximate inverses of the loss's Hessian.

With doubts w_ik = p_k (1 − p_k) of row i (see `saebench.probe.objective`), the Hessian of the
weights and bias of class k among themselves is  mean over i of w_ik [x̃_i 1][x̃_i 1]ᵀ + λ I.

    Blocks      it is this for every class by itself: d small
    Whitening   doubts are taken to be the same for all rows: with Σ = x̃ᵀx̃/n = U diag(e) Uᵀ and w_k
                their mean, w_k Σ + λ I, and w_k for the bias. Where d is so large that Σ costs more
                than it saves, Σ is taken to be 1

The penalty is in both as it is. Neither changes where the minimum is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from saebench.probe.rows import Rows

SAMPLE = 4096  # rows, that they are taken from
WIDEST = 128  # features of Blocks
MOST = 2**24  # numbers of Blocks


class Curvature(Protocol):
    def divide(self, gradient: Tensor) -> Tensor:
        """The gradient [d + 1, c] over the curvature: a Newton step, were it the Hessian."""
        ...


@dataclass(frozen=True, eq=False)
class Spectrum:
    """e_d and U_dd of Σ; U is None where Σ is taken to be 1."""

    e_d: Tensor
    U_dd: Tensor | None

    @classmethod
    def of(cls, rows: Rows) -> Spectrum:
        covariance_dd = rows.covariance(max(SAMPLE, 4 * rows.d))
        if covariance_dd is None:
            return cls(torch.ones(rows.d, dtype=rows.dtype, device=rows.device), None)
        # In float64: of few images it has low rank, and then LAPACK gives NaN in float32.
        e_d, U_dd = torch.linalg.eigh(covariance_dd.double())
        return cls(e_d.clamp_min(0).to(rows.dtype), U_dd.to(rows.dtype))

    def times(self, point_dc: Tensor) -> Tensor:
        """Σ W."""
        if self.U_dd is None:
            return point_dc
        return self.U_dd @ (self.e_d.unsqueeze(1) * (self.U_dd.T @ point_dc))


@dataclass(frozen=True, eq=False)
class Whitening:
    spectrum: Spectrum
    size: Tensor  # [d + 1, c]: along U, then of the biases

    @classmethod
    def of(cls, spectrum: Spectrum, doubt_c: Tensor, penalty: float) -> Whitening:
        weights = spectrum.e_d.unsqueeze(1) * doubt_c + penalty
        return cls(spectrum, torch.cat([weights, doubt_c.unsqueeze(0)]))

    def divide(self, gradient: Tensor) -> Tensor:
        U_dd = self.spectrum.U_dd
        if U_dd is None:
            return gradient / self.size
        along = torch.empty_like(gradient)
        torch.mm(U_dd.T, gradient[:-1], out=along[:-1])
        along[-1] = gradient[-1]
        along /= self.size
        along[:-1] = U_dd @ along[:-1]
        return along


@dataclass(frozen=True, eq=False)
class Blocks:
    inverse_cee: Tensor  # [c, d + 1, d + 1]

    @classmethod
    def of(
        cls,
        x_md: Tensor,
        p_mc: Tensor,
        n: int,
        others_c: Tensor,
        spectrum: Spectrum,
        penalty: float,
    ) -> Blocks:
        """From some of n rows and their probabilities. others_c: mean doubts of the other rows."""
        x_me = pad(x_md, (0, 1), value=1.0)
        doubt_cm = ((p_mc - p_mc.square()) / n).T.contiguous()
        weighted = [(x_me * doubt_m.unsqueeze(1)).T @ x_me for doubt_m in doubt_cm]
        found_cee = torch.stack(weighted).double()
        if len(x_md) < n:
            every_dd = torch.eye(x_md.shape[1], dtype=x_md.dtype, device=x_md.device)
            found_cee[:, :-1, :-1] += others_c[:, None, None] * spectrum.times(every_dd)
            found_cee[:, -1, -1] += others_c
        diagonal_ce = found_cee.diagonal(dim1=1, dim2=2)
        diagonal_ce[:, :-1] += penalty
        # So that it can be inverted where all rows are sure of a class.
        diagonal_ce += 1e-6 * diagonal_ce.mean(dim=1, keepdim=True) + 1e-3 / n**2
        factor_cee = torch.linalg.cholesky(found_cee)
        return cls(torch.cholesky_inverse(factor_cee).to(x_md.dtype))

    def divide(self, gradient: Tensor) -> Tensor:
        return torch.bmm(self.inverse_cee, gradient.T.unsqueeze(2)).squeeze(2).T.contiguous()


def have_room(rows: Rows, n_classes: int) -> bool:
    """Whether Blocks of these rows are worth their room and time."""
    return rows.d <= WIDEST and n_classes * (rows.d + 1) ** 2 <= MOST
