"""What turns an SAE's pre-activations [n s] into codes: one frozen class an activation.

    Threshold  z = pre where pre > max(θ, 0)         θ = 0: ReLU; a scalar: BatchTopK; [s]: JumpReLU
    TopK       z = the k largest of ReLU(pre); signed: the k largest of pre, whatever their sign;
               by magnitude: the k largest of |pre|, their sign kept
    GroupMax   z = the largest of ReLU(pre) in each of k groups of neighbours
    Gated      z = ReLU(exp(r)·pre + b_mag) where pre + b_gate > 0; with k: the k largest of it,
               before those are dropped whose gate is closed
    LeakyReLU  z = pre, times a slope where pre < 0

Around one of them:

    LatentNorm  pre is layer-normed over the s latents before
    Absolute    |pre| in place of pre
    Squash      c·tanh(z/c) in place of z

Comparisons are strict, unless a `Threshold` is inclusive. A row's code depends on that row alone: a
BatchTopK SAE is evaluated with its stored threshold, never with the top k·b of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, leaky_relu

from saebench.codes import Codes
from saebench.topk import topk


class Activation(Protocol):
    """[n s] pre-activations to codes. `tensors` are its own weights, by their stored names.

    `k`: the most latents of a row that can be active, where that is fixed.
    """

    @property
    def k(self) -> int | None: ...
    @property
    def tensors(self) -> dict[str, Tensor]: ...
    def codes(self, pre_ns: Tensor) -> Codes: ...


@dataclass(frozen=True, eq=False)
class Threshold:
    """z = pre where pre > max(θ, 0): ReLU at θ = 0, BatchTopK with a scalar, JumpReLU with [s].

    `inclusive`: a positive pre that equals θ is kept.
    """

    theta: Tensor | float = 0.0
    inclusive: bool = False
    k = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"threshold": self.theta} if isinstance(self.theta, Tensor) else {}

    def codes(self, pre_ns: Tensor) -> Codes:
        theta = self.theta
        least = theta.clamp(min=0) if isinstance(theta, Tensor) else max(theta, 0.0)
        if self.inclusive:
            return Codes.where((pre_ns >= least) & (pre_ns > 0), pre_ns)
        return Codes.where(pre_ns > least, pre_ns)


@dataclass(frozen=True, eq=False)
class TopK:
    """The k largest of a row. Without `signed`, values that are not positive count as zero.

    `by_magnitude` (signed only): the k of largest |pre|.
    """

    k: int
    signed: bool = False
    by_magnitude: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    def codes(self, pre_ns: Tensor) -> Codes:
        values_nk, indices_nk = topk(pre_ns.abs() if self.by_magnitude else pre_ns, self.k)
        if self.by_magnitude:
            values_nk = pre_ns.gather(1, indices_nk)
        if not self.signed:  # selecting before ReLU leaves the same code as selecting after it
            values_nk = values_nk.relu()
        return Codes.from_topk(values_nk, indices_nk, pre_ns.shape[1])


@dataclass(frozen=True, eq=False)
class GroupMax:
    """The largest of each of k groups of s/k neighbouring latents, where it is positive."""

    k: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    def codes(self, pre_ns: Tensor) -> Codes:
        values_nk, at_nk = pre_ns.unflatten(1, (self.k, -1)).max(dim=2)
        size = pre_ns.shape[1] // self.k
        starts_k = torch.arange(0, pre_ns.shape[1], size, device=pre_ns.device)
        return Codes.from_topk(values_nk.relu(), at_nk + starts_k, pre_ns.shape[1])


@dataclass(frozen=True, eq=False)
class Gated:
    """A gate decides which latents are active, a rescaled copy of the encoder how much.

    `k`: only the k largest of a row are kept, whether their gates are open or not.
    """

    b_gate_s: Tensor
    r_mag_s: Tensor
    b_mag_s: Tensor
    k: int | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"b_gate": self.b_gate_s, "r_mag": self.r_mag_s, "b_mag": self.b_mag_s}

    def codes(self, pre_ns: Tensor) -> Codes:
        open_ns = pre_ns + self.b_gate_s > 0
        magnitude_ns = torch.addcmul(self.b_mag_s, pre_ns, self.r_mag_s.exp())
        if self.k is None:
            return Codes.where(open_ns & (magnitude_ns > 0), magnitude_ns)
        values_nk, indices_nk = topk(magnitude_ns, self.k)
        values_nk = values_nk.relu() * open_ns.gather(1, indices_nk)
        return Codes.from_topk(values_nk, indices_nk, pre_ns.shape[1])


@dataclass(frozen=True, eq=False)
class LeakyReLU:
    """Every latent is active, those below zero with a slope. Not sparse: L0 is s."""

    slope: float = 0.01
    k = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    def codes(self, pre_ns: Tensor) -> Codes:
        return Codes.from_dense(leaky_relu(pre_ns, self.slope))


@dataclass(frozen=True, eq=False)
class _Around:
    """Something around another activation, whose k and weights it has."""

    inner: Activation

    @property
    def k(self) -> int | None:
        return self.inner.k

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.inner.tensors


@dataclass(frozen=True, eq=False)
class LatentNorm(_Around):
    """Layer norm over the s latents (biased variance, as torch's), then another activation."""

    gain_s: Tensor
    shift_s: Tensor
    eps: float = 1e-5

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.inner.tensors, "latent_gain": self.gain_s, "latent_shift": self.shift_s}

    def codes(self, pre_ns: Tensor) -> Codes:
        normed_ns = layer_norm(pre_ns, pre_ns.shape[1:], self.gain_s, self.shift_s, self.eps)
        return self.inner.codes(normed_ns)


@dataclass(frozen=True, eq=False)
class Absolute(_Around):
    """|pre| in place of pre: what is kept are magnitudes."""

    def codes(self, pre_ns: Tensor) -> Codes:
        return self.inner.codes(pre_ns.abs())


@dataclass(frozen=True, eq=False)
class Squash(_Around):
    """c·tanh(z/c) in place of z: no latent exceeds c."""

    cap: float = 1.0

    def codes(self, pre_ns: Tensor) -> Codes:
        codes = self.inner.codes(pre_ns)
        return replace(codes, values_m=self.cap * torch.tanh(codes.values_m / self.cap))
