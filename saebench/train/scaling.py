"""The input scaling that makes hyperparameters carry over, and its way in and out of the weights.

Training sees x' = (x − m)/c with m [d] the mean of the train rows and c = √(E‖x − m‖²) one scalar,
so that E x' = 0 and E‖x'‖² = 1. Nothing of it is left in a finished SAE: with z = c·z' and unit
decoder rows,

    W_enc = W_enc',  W_dec = W_dec',  b_dec = m + c·b_dec',  b_enc, θ, b_mag = c·(the same)'

so its latents are in units of the activations, and pre = (x − b_dec) W_enc + b_enc on raw x.
All activations here are positively homogeneous, so that this is exact up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from saebench.errors import DataError, NonFiniteError

SCALED = ("b_enc_s", "threshold_s", "b_mag_s")  # multiplied by c; W_enc, W_dec and r_mag are not


@dataclass(frozen=True)
class Scaling:
    """x' = (x − mean_d) / scale."""

    mean_d: Tensor
    scale: float

    def __call__(self, x_nd: Tensor) -> Tensor:
        return (x_nd - self.mean_d) / self.scale

    def fold(self, scaled: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights for scaled rows -> weights for raw rows."""
        raw = {k: v * self.scale if k in SCALED else v for k, v in scaled.items()}
        raw["b_dec_d"] = self.mean_d + self.scale * scaled["b_dec_d"]
        return raw

    def unfold(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights for raw rows -> weights for scaled rows."""
        scaled = {k: v / self.scale if k in SCALED else v for k, v in raw.items()}
        scaled["b_dec_d"] = (raw["b_dec_d"] - self.mean_d) / self.scale
        return scaled


def measure_scaling(tiles: Iterable[Tensor]) -> Scaling:
    """m and c over tiles [n d], in float64. Errors: NonFiniteError; DataError if x is constant."""
    tiles = iter(tiles)
    first_nd = next(tiles, None)
    if first_nd is None or not len(first_nd):
        raise DataError("there are no activations to train on")
    shift_d = first_nd[0].double()  # sums of squares around a row do not cancel
    total_d, squares_d, n = torch.zeros_like(shift_d), torch.zeros_like(shift_d), 0
    for x_nd in chain([first_nd], tiles):
        y_nd = x_nd.double() - shift_d
        n += len(y_nd)
        total_d += y_nd.sum(0)
        squares_d += y_nd.square().sum(0)
    mean_d = total_d / n
    variance = float((squares_d / n - mean_d.square()).sum())
    if not torch.isfinite(mean_d).all() or variance != variance:
        raise NonFiniteError("the activations to train on hold NaN or infinite values")
    if variance <= 0:
        raise DataError("the activations to train on are all the same", "is it the right site?")
    return Scaling((mean_d + shift_d).float(), variance**0.5)


def geometric_median(x_nd: Tensor, iterations: int = 100) -> Tensor:
    """[d]: argmin_m Σ_n ‖x_n − m‖, by Weiszfeld's iteration from the mean."""
    x_nd = x_nd.double()
    median_d = x_nd.mean(0)
    for _ in range(iterations):
        weight_n = 1 / (x_nd - median_d).norm(dim=-1).clamp_min(1e-12)
        moved_d = (weight_n @ x_nd) / weight_n.sum()
        step = float((moved_d - median_d).norm())
        median_d = moved_d
        if step < 1e-9:
            break
    return median_d.float()
