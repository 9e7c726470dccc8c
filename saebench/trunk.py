"""The hidden layers of an encoder that is not a single matrix (overcomplete's MLP encoders).

    h ← ReLU(norm(h A + a))          and  + h  with a residual connection

Batch norms are part of A and a: with running statistics they are affine, and readers fold them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import layer_norm


@dataclass(frozen=True, eq=False)
class Block:
    """W_ih [i h], b_h [h]; with a layer norm over h: gain_h and shift_h [h]."""

    W_ih: Tensor
    b_h: Tensor
    gain_h: Tensor | None = None
    shift_h: Tensor | None = None
    eps: float = 1e-5
    residual: bool = False

    def __call__(self, u_ni: Tensor) -> Tensor:
        h_nh = u_ni @ self.W_ih + self.b_h
        if self.gain_h is not None:
            h_nh = layer_norm(h_nh, h_nh.shape[1:], self.gain_h, self.shift_h, self.eps)
        h_nh = h_nh.relu()
        return h_nh + u_ni if self.residual else h_nh


@dataclass(frozen=True, eq=False)
class Trunk:
    """The blocks, first to last."""

    blocks: tuple[Block, ...]

    @property
    def d_in(self) -> int:
        return self.blocks[0].W_ih.shape[0]

    @property
    def d_out(self) -> int:
        return self.blocks[-1].W_ih.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names they are stored under: trunk.<i>.W and so on."""
        return {
            f"trunk.{i}.{name}": tensor
            for i, block in enumerate(self.blocks)
            for name, tensor in (
                ("W", block.W_ih),
                ("b", block.b_h),
                ("gain", block.gain_h),
                ("shift", block.shift_h),
            )
            if tensor is not None
        }

    def __call__(self, u_nd: Tensor) -> Tensor:
        for block in self.blocks:
            u_nd = block(u_nd)
        return u_nd
