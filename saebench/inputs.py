"""What is done to raw activations before an SAE sees them, and undone behind it.

    u = rows((x − mean) · scale)         x̂ = unrows(û) / scale + mean

`rows` normalises each row by itself. What it took away travels with the codes (`codes.Frame`), so
that `decode(encode(x))` gives raw activations again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from saebench.codes import Frame


class RowNorm(Protocol):
    """Normalises rows [n d], and says what `Frame.undo` needs to take it back."""

    def __call__(self, x_nd: Tensor) -> tuple[Tensor, Frame]: ...


@dataclass(frozen=True)
class LayerNorm:
    """u = (x − mean(x)) / (std(x) + eps), back: û·std + mean: not an exact inverse, by eps.

    With the unbiased deviation (d − 1), as SAELens, ViT-Prisma, OpenAI, mlsae, MSAE and MonoLoss
    take it; all add 1e-5.
    """

    eps: float = 1e-5

    def __call__(self, x_nd: Tensor) -> tuple[Tensor, Frame]:
        shift_n = x_nd.mean(dim=1)
        u_nd = x_nd - shift_n[:, None]
        std_n = u_nd.std(dim=1, correction=1)
        return u_nd / (std_n + self.eps)[:, None], Frame(std_n, shift_n)


@dataclass(frozen=True)
class Length:
    """u = x · length/‖x‖, back: û·‖x‖/length. None: √d. A row of zeros is left as it is."""

    length: float | None = None

    def __call__(self, x_nd: Tensor) -> tuple[Tensor, Frame]:
        length = x_nd.shape[1] ** 0.5 if self.length is None else self.length
        scale_n = x_nd.norm(dim=1) / length
        scale_n = torch.where(scale_n > 0, scale_n, torch.ones_like(scale_n))
        return x_nd / scale_n[:, None], Frame(scale_n)


@dataclass(frozen=True)
class InTurn:
    """One norm and then another: MonoLoss's loader takes lengths away, its SAE standardises."""

    first: RowNorm
    then: RowNorm

    def __call__(self, x_nd: Tensor) -> tuple[Tensor, Frame]:
        u_nd, outer = self.first(x_nd)
        u_nd, inner = self.then(u_nd)
        return u_nd, _around(outer, inner)


def _around(outer: Frame, inner: Frame) -> Frame:
    """The frame that undoes first the inner one, then the outer one."""
    scale_n, shift_n = inner.scale_n, inner.shift_n
    if outer.scale_n is not None:
        scale_n = outer.scale_n if scale_n is None else outer.scale_n * scale_n
        shift_n = None if shift_n is None else outer.scale_n * shift_n
    if outer.shift_n is not None:
        shift_n = outer.shift_n if shift_n is None else outer.shift_n + shift_n
    return Frame(scale_n, shift_n)


@dataclass(frozen=True)
class OneWay:
    """A norm that is not undone: what a transcoder writes has a scale of its own."""

    norm: RowNorm

    def __call__(self, x_nd: Tensor) -> tuple[Tensor, Frame]:
        return self.norm(x_nd)[0], Frame()


@dataclass(frozen=True, eq=False)
class Scaling:
    """mean_d [d]; scale a number, or [d] float32, that multiplies; rows: the norm of each row."""

    mean_d: Tensor | None = None
    scale: Tensor | float = 1.0
    rows: RowNorm | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names they are stored under."""
        named = {"mean": self.mean_d, "scale": self.scale}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    @property
    def is_affine(self) -> bool:
        """Whether it is the same for all rows."""
        return self.rows is None

    @property
    def _scales(self) -> bool:
        return isinstance(self.scale, Tensor) or self.scale != 1

    def __call__(self, x_nd: Tensor) -> tuple[Tensor, Frame | None]:
        u_nd = x_nd.float()
        if self.mean_d is not None:
            u_nd = u_nd - self.mean_d
        if self._scales:
            u_nd = u_nd * self.scale
        return (u_nd, None) if self.rows is None else self.rows(u_nd)

    def undo(self, u_nd: Tensor) -> Tensor:
        """What is the same for all rows, undone; what is of each row is its frame's to undo."""
        if self._scales:
            u_nd = u_nd / self.scale
        return u_nd if self.mean_d is None else u_nd + self.mean_d
