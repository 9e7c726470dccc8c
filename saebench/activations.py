"""What turns an SAE's pre-activations [n s] into codes: one frozen class an activation.

    Threshold  z = pre where pre > max(θ, 0)         θ = 0: ReLU; a scalar: BatchTopK; [s]: JumpReLU
    TopK       z = the k largest of ReLU(pre); signed: the k largest of pre, whatever their sign
    Gated      z = ReLU(exp(r)·pre + b_mag) where pre + b_gate > 0

Comparisons are strict. A row's code depends on that row alone: a BatchTopK SAE is evaluated with
its stored threshold, never with the top k·b of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from saebench.codes import Codes
from saebench.topk import topk


class Activation(Protocol):
    """[n s] pre-activations to codes. `tensors` are its own weights, by their stored names."""

    @property
    def tensors(self) -> dict[str, Tensor]: ...
    def codes(self, pre_ns: Tensor) -> Codes: ...
    def to(self, device: torch.device | str) -> Activation: ...


@dataclass(frozen=True, eq=False)
class Threshold:
    """z = pre where pre > max(θ, 0): ReLU at θ = 0, BatchTopK with a scalar, JumpReLU with [s]."""

    theta: Tensor | float = 0.0

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"threshold": self.theta} if isinstance(self.theta, Tensor) else {}

    def codes(self, pre_ns: Tensor) -> Codes:
        theta = self.theta
        least = theta.clamp(min=0) if isinstance(theta, Tensor) else max(theta, 0.0)
        return Codes.where(pre_ns > least, pre_ns)

    def to(self, device: torch.device | str) -> Threshold:
        return Threshold(self.theta.to(device) if isinstance(self.theta, Tensor) else self.theta)


@dataclass(frozen=True, eq=False)
class TopK:
    """The k largest of a row. Without `signed`, values that are not positive count as zero."""

    k: int
    signed: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    def codes(self, pre_ns: Tensor) -> Codes:
        values_nk, indices_nk = topk(pre_ns, self.k)
        if not self.signed:  # selecting before ReLU leaves the same code as selecting after it
            values_nk = values_nk.relu()
        return Codes.from_topk(values_nk, indices_nk, pre_ns.shape[1])

    def to(self, device: torch.device | str) -> TopK:
        return self


@dataclass(frozen=True, eq=False)
class Gated:
    """A gate decides which latents are active, a rescaled copy of the encoder how much."""

    b_gate_s: Tensor
    r_mag_s: Tensor
    b_mag_s: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"b_gate": self.b_gate_s, "r_mag": self.r_mag_s, "b_mag": self.b_mag_s}

    def codes(self, pre_ns: Tensor) -> Codes:
        open_ns = pre_ns + self.b_gate_s > 0
        magnitude_ns = torch.addcmul(self.b_mag_s, pre_ns, self.r_mag_s.exp())
        return Codes.where(open_ns & (magnitude_ns > 0), magnitude_ns)

    def to(self, device: torch.device | str) -> Gated:
        return Gated(self.b_gate_s.to(device), self.r_mag_s.to(device), self.b_mag_s.to(device))
