"""The SAE that every checkpoint format is turned into: one forward pass, all scaling inside.

    u   = (x − mean) · scale                   x [n d] raw activations
    pre = (u − b_dec) @ W_enc + b_enc          the subtraction only with `pre_bias`
    z   = activation(pre)                      z [n s]           (saebench.activations)
    x̂   = (z @ W_dec + b_dec) / scale + mean   x̂ [n d], again in raw activation space

Nothing in it depends on other rows of a batch.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saebench.activations import Activation, TopK
from saebench.codes import Codes
from saebench.errors import WeightsError

TILE_BYTES = 256 * 2**20  # the most that the pre-activations of a row tile may take
CACHE_BYTES = 16 * 2**20  # what they take where that suffices: selection finds them in the cache
SMALLEST_TILE = 128  # rows: with fewer a product loses its speed
DENSE = 0.15  # share of active latents above which decoding by a dense product is faster
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka-batchtopk")


class Coder(Protocol):
    """What is measured: an SAE, a control, or anything of this form."""

    @property
    def d_model(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def architecture(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def decoder_norms_s(self) -> Tensor: ...  # [s] the raw-space length of one unit of a latent
    def encode(self, x_nd: Tensor, *, tile_bytes: int = TILE_BYTES) -> Codes: ...
    def decode(self, codes: Codes) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Sae:
    """Weights float32 on one device. Errors: WeightsError (shapes that disagree, NaN, infinity).

    `scale` and `mean_d` are the input scaling. `prefixes` are the nested dictionary sizes of a
    Matryoshka SAE, the last of them s. `stored_dtype` is what the file held before float32.
    """

    W_enc_ds: Tensor
    b_enc_s: Tensor
    W_dec_sd: Tensor
    b_dec_d: Tensor
    activation: Activation
    architecture: str
    pre_bias: bool = False
    scale: float = 1.0
    mean_d: Tensor | None = None
    prefixes: tuple[int, ...] = ()
    stored_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.W_enc_ds.ndim != 2:
            raise WeightsError(f"W_enc has shape {list(self.W_enc_ds.shape)}, not [d s]")
        d, s = self.W_enc_ds.shape
        expected = {"W_enc": [d, s], "b_enc": [s], "W_dec": [s, d], "b_dec": [d], "mean": [d]}
        for name, tensor in self.tensors.items():
            shape = expected.get(name, [s] if tensor.ndim else [])
            if list(tensor.shape) != shape:
                raise WeightsError(
                    f"{name} has shape {list(tensor.shape)}, and W_enc [{d} {s}] asks for {shape}",
                    "the file mixes two SAEs, or a matrix is transposed",
                )
            if not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise WeightsError(
                    f"{name} holds {bad} NaN or infinite values of {tensor.numel()}",
                    "the SAE diverged in training or its file is damaged: use another checkpoint",
                )
        if not 0 < abs(self.scale) < float("inf"):
            raise WeightsError(f"the input scale is {self.scale}, not a finite number other than 0")
        if self.k is not None and not 0 < self.k <= s:
            raise WeightsError(f"k = {self.k} of {s} latents is not possible")
        rising = list(self.prefixes) == sorted(set(self.prefixes))
        if self.prefixes and not (rising and self.prefixes[0] > 0 and self.prefixes[-1] == s):
            raise WeightsError(f"the prefixes {list(self.prefixes)} do not rise to d_sae = {s}")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every weight by the name it is stored under."""
        tensors = {
            "W_enc": self.W_enc_ds,
            "b_enc": self.b_enc_s,
            "W_dec": self.W_dec_sd,
            "b_dec": self.b_dec_d,
            **self.activation.tensors,
        }
        return tensors if self.mean_d is None else {**tensors, "mean": self.mean_d}

    @property
    def d_model(self) -> int:
        return self.W_enc_ds.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc_ds.shape[1]

    @property
    def k(self) -> int | None:
        return self.activation.k if isinstance(self.activation, TopK) else None

    @property
    def device(self) -> torch.device:
        return self.W_enc_ds.device

    @property
    def n_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def decoder_norms_s(self) -> Tensor:
        """[s] float64, the length in raw activation space of what one unit of a latent adds."""
        return self._decoder_norms_s

    @cached_property
    def _decoder_norms_s(self) -> Tensor:
        return self.W_dec_sd.double().norm(dim=1) / abs(self.scale)

    def to(self, device: torch.device | str) -> Sae:
        """The same SAE on another device."""
        moved = {
            field.name: value.to(device)
            for field in fields(self)
            if hasattr(value := getattr(self, field.name), "to")
        }
        return replace(self, **moved)

    def encode(self, x_nd: Tensor, *, tile_bytes: int = TILE_BYTES) -> Codes:
        """Codes of raw activations x [n d], any n.

        At most `tile_bytes` of pre-activations are held at once.
        """
        if x_nd.shape[0] == 0:
            return Codes.empty(0, self.d_sae, x_nd.device)
        rows = max(1, min(self._cached_rows, tile_bytes // (4 * self.d_sae)))
        return Codes.cat([self.activation.codes(self._pre(tile)) for tile in x_nd.split(rows)])

    @property
    def _cached_rows(self) -> int:
        return max(CACHE_BYTES // (4 * self.d_sae), SMALLEST_TILE)

    def _pre(self, x_nd: Tensor) -> Tensor:
        u_nd = x_nd.float()
        if self.mean_d is not None:
            u_nd = u_nd - self.mean_d
        if self.scale != 1:
            u_nd = u_nd * self.scale
        if self.pre_bias:
            u_nd = u_nd - self.b_dec_d
        return affine(u_nd, self.W_enc_ds, self.b_enc_s)

    def decode(self, codes: Codes) -> Tensor:
        """x̂ [n d] float32 in raw activation space."""
        u_nd = self._weighted_rows(codes) + self.b_dec_d
        if self.scale != 1:
            u_nd = u_nd / self.scale
        return u_nd if self.mean_d is None else u_nd + self.mean_d

    def _weighted_rows(self, codes: Codes) -> Tensor:
        """z @ W_dec."""
        if codes.n_nonzero > DENSE * codes.n_rows * self.d_sae:
            rows = self._cached_rows
            starts = range(0, codes.n_rows, rows)
            return torch.cat([codes[i : i + rows].dense() @ self.W_dec_sd for i in starts])
        return embedding_bag(
            codes.indices_m,
            self.W_dec_sd,
            codes.offsets_n1,
            mode="sum",
            per_sample_weights=codes.values_m,
            include_last_offset=True,
        )


def affine(u_nd: Tensor, W_ds: Tensor, b_s: Tensor) -> Tensor:
    """u @ W + b, float32.

    On x86 processors by oneDNN, which is faster there than the library behind `addmm`: by a fifth
    with AVX-512 on AMD (docs/performance.md).
    """
    if _ONEDNN and u_nd.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(u_nd, W_ds.T, b_s, "none", [], "")
    return torch.addmm(b_s, u_nd, W_ds)


_ONEDNN = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
