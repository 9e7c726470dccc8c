"""The SAE that every checkpoint format is turned into: one forward pass, all scaling inside.

    u   = rows((x − mean) · scale)             x [n d] raw activations     (saebench.inputs)
    pre = trunk(u − b_pre) @ W_enc + b_enc     b_pre and trunk, where there are any
    z   = activation(pre)                      z [n s]                     (saebench.activations)
    x̂   = unrows(z @ W_dec + b_dec) / scale + mean                         again raw activations

A transcoder's output is not an estimate of its input but of another activation; with a skip
connection, x @ skip.T is added before `unrows`. Nothing depends on other rows of a batch.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saebench.activations import Activation, GroupMax
from saebench.codes import Codes, Frame
from saebench.errors import NonFiniteError, UsageError, WeightsError
from saebench.finite import all_finite
from saebench.inputs import Scaling
from saebench.moving import moved
from saebench.record import Record
from saebench.trunk import Trunk

TILE_BYTES = 256 * 2**20  # the most that the pre-activations of a row tile may take
CACHE_BYTES = 16 * 2**20  # what they take where that suffices: selection finds them in the cache
SMALLEST_TILE = 128  # rows: with fewer a product loses its speed
DENSE = 0.15  # share of active latents above which decoding by a dense product is faster
ARCHITECTURES = (
    "relu",
    "topk",
    "batchtopk",
    "jumprelu",
    "gated",
    "matryoshka-batchtopk",
    "matryoshka-relu",
    "matryoshka-topk",
    "groupmax",
    "leaky-relu",
    "tanh-relu",
    "matching-pursuit",
    "orthogonal-matching-pursuit",
)


class Coder(Protocol):
    """What is measured: an SAE, a control, or anything of this form."""

    @property
    def d_model(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def architecture(self) -> str: ...
    @property
    def transcoder(self) -> bool: ...  # whether what it writes is not an estimate of what it reads
    @property
    def n_bytes(self) -> int: ...
    @property
    def decoder_norms_s(self) -> Tensor: ...  # [s] the raw-space length of one unit of a latent
    def encode(self, x_nd: Tensor, *, tile_bytes: int = TILE_BYTES) -> Codes: ...
    def decode(self, codes: Codes) -> Tensor: ...


@dataclass(frozen=True, eq=False, repr=False)
class Sae:
    """Weights float32 on one device. Errors: WeightsError (shapes that disagree, NaN, infinity).

    W_enc_ds [d s], or [h s] behind a `trunk`; W_dec_sd [s d]; b_pre_d is subtracted before the
    encoder (in most SAEs that have one it is b_dec_d itself). `prefixes` are the nested dictionary
    sizes of a Matryoshka SAE, the last of them s. `stored_dtype` is what the file held before
    float32, `record` where each fact came from.
    """

    W_enc_ds: Tensor
    b_enc_s: Tensor
    W_dec_sd: Tensor
    b_dec_d: Tensor
    activation: Activation
    architecture: str
    b_pre_d: Tensor | None = None
    scaling: Scaling = Scaling()
    trunk: Trunk | None = None
    transcoder: bool = False
    skip_dd: Tensor | None = None  # [output input]
    prefixes: tuple[int, ...] = ()
    stored_dtype: str = "float32"
    record: Record = Record()

    def __post_init__(self) -> None:
        # The rows of the decoder are gathered: a transposed view would be copied at every batch.
        object.__setattr__(self, "W_dec_sd", self.W_dec_sd.contiguous())
        check_shapes(self)
        check_finite(self.tensors)
        scale = self.scaling.scale
        if not isinstance(scale, Tensor) and not 0 < abs(scale) < float("inf"):
            raise WeightsError(f"the input scale is {scale}, not a finite number other than 0")
        if isinstance(scale, Tensor) and not scale.all():
            raise WeightsError("the input scale is 0 in some dimension")

    def __repr__(self) -> str:
        parts = [self.architecture, f"{self.d_model} -> {self.d_sae}"]
        parts += [f"k={self.k}"] if self.k is not None else []
        parts += ["transcoder"] if self.transcoder else []
        parts += [f"format={self.record.format}"] if self.record.format else []
        return f"Sae({', '.join(parts)})"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every weight by the name it is stored under."""
        tensors = {
            "W_enc": self.W_enc_ds,
            "b_enc": self.b_enc_s,
            "W_dec": self.W_dec_sd,
            "b_dec": self.b_dec_d,
            **self.activation.tensors,
            **self.scaling.tensors,
        }
        if self.b_pre_d is not None and self.b_pre_d is not self.b_dec_d:
            tensors["b_pre"] = self.b_pre_d
        if self.trunk is not None:
            tensors |= self.trunk.tensors
        return tensors if self.skip_dd is None else {**tensors, "skip": self.skip_dd}

    @property
    def d_model(self) -> int:
        """d, the width of what it reads."""
        return self.W_enc_ds.shape[0] if self.trunk is None else self.trunk.d_in

    @property
    def d_out(self) -> int:
        """The width of what it writes: d, but for a transcoder between two widths."""
        return self.W_dec_sd.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_enc_ds.shape[1]

    @property
    def k(self) -> int | None:
        """The most latents of a row that can be active, where that is fixed."""
        return self.activation.k

    @property
    def device(self) -> torch.device:
        return self.W_enc_ds.device

    @property
    def n_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def decoder_norms_s(self) -> Tensor:
        """[s] float64, the length in raw activation space of what one unit of a latent adds.

        Of an SAE that normalises its rows, the length beside normalised rows.
        """
        return self._decoder_norms_s

    @cached_property
    def _decoder_norms_s(self) -> Tensor:
        if isinstance(self.scaling.scale, Tensor):
            return (self.W_dec_sd.double() / self.scaling.scale).norm(dim=1)
        return self.W_dec_sd.double().norm(dim=1) / abs(self.scaling.scale)

    def to(self, device: torch.device | str) -> Sae:
        """The same SAE on another device."""
        return moved(self, device)

    def recorded(self, record: Record) -> Sae:
        """The same SAE with another record: its weights are not checked again."""
        same = copy(self)
        object.__setattr__(same, "record", record)
        return same

    def encode(self, x_nd: Tensor, *, tile_bytes: int = TILE_BYTES) -> Codes:
        """Codes of raw activations x [n d], any n; on the device of the weights.

        At most `tile_bytes` of pre-activations are held at once.
        Errors: UsageError for another shape; NonFiniteError, since a comparison with NaN is false
        and would leave an empty code that looks like an answer.
        """
        if x_nd.ndim != 2 or x_nd.shape[1] != self.d_model:
            raise UsageError(
                f"x has shape {list(x_nd.shape)}, and this SAE reads rows [n {self.d_model}]",
                "flatten images and tokens: x_btd.flatten(0, 1)",
            )
        if x_nd.shape[0] == 0:
            return Codes.empty(0, self.d_sae, x_nd.device)
        if not all_finite(x_nd):
            raise NonFiniteError("x holds NaN or infinite values", "look at what computed it")
        rows = max(1, min(cached_rows(self.d_sae), tile_bytes // (4 * self.d_sae)))
        return Codes.cat([self._encode(tile_nd) for tile_nd in x_nd.split(rows)])

    def _encode(self, x_nd: Tensor) -> Codes:
        u_nd, frame = self.scaling(x_nd)
        if self.b_pre_d is not None:
            u_nd = u_nd - self.b_pre_d
        if self.trunk is not None:
            u_nd = self.trunk(u_nd)
        if self.skip_dd is not None:
            frame = replace(frame or Frame(), skip_nd=x_nd.float() @ self.skip_dd.T)
        pre_ns = affine(u_nd, self.W_enc_ds, self.b_enc_s)
        return self.activation.codes(pre_ns).framed(frame)

    def decode(self, codes: Codes) -> Tensor:
        """x̂ [n d] float32 in raw activation space.

        Errors: UsageError for codes without the frame that an SAE needs which normalises rows.
        """
        u_nd = weighted_rows(codes, self.W_dec_sd) + self.b_dec_d
        if codes.frame is not None:
            u_nd = codes.frame.undo(u_nd)
        elif codes.n_rows and (self.scaling.rows is not None or self.skip_dd is not None):
            raise no_frame()
        return self.scaling.undo(u_nd)


def no_frame() -> UsageError:
    """Codes that do not hold what decoding them takes beside them (`codes.Frame`)."""
    return UsageError(
        "these codes do not hold what their rows were normalised by",
        "take the codes that encode gives, or Codes.from_dense(z, frame=codes.frame)",
    )


def weighted_rows(codes: Codes, W_sd: Tensor) -> Tensor:
    """z @ W for codes z [n s] and W [s d], contiguous."""
    if codes.n_nonzero > DENSE * codes.n_rows * codes.d_sae:
        rows = cached_rows(codes.d_sae)
        starts = range(0, codes.n_rows, rows)
        return torch.cat([codes[i : i + rows].dense() @ W_sd for i in starts])
    return embedding_bag(
        codes.indices_m,
        W_sd,
        codes.offsets_n1,
        mode="sum",
        per_sample_weights=codes.values_m,
        include_last_offset=True,
    )


def cached_rows(d_sae: int) -> int:
    """How many rows of s pre-activations stay in the cache."""
    return max(CACHE_BYTES // (4 * d_sae), SMALLEST_TILE)


def check_shapes(sae: Sae) -> None:
    """Errors: WeightsError where the shapes of an SAE's tensors do not fit each other."""
    if sae.W_enc_ds.ndim != 2 or sae.W_dec_sd.ndim != 2:
        raise WeightsError(
            f"W_enc and W_dec are no matrices but {list(sae.W_enc_ds.shape)}, "
            f"{list(sae.W_dec_sd.shape)}"
        )
    h, s = sae.W_enc_ds.shape
    d = sae.d_model
    if not min(d, h, s, sae.d_out):
        raise WeightsError(f"an SAE of {d} dimensions and {s} latents is empty", "get it again")
    out = sae.d_out if sae.transcoder else d
    if sae.trunk is not None and sae.trunk.d_out != h:
        raise WeightsError(f"its trunk gives {sae.trunk.d_out} dimensions, and W_enc reads {h}")
    expected = {
        "W_enc": [h, s],
        "W_dec": [s, out],
        "b_dec": [out],
        "b_pre": [d],
        "mean": [d],
        "scale": [d],
        "skip": [out, d],
    }
    for name, tensor in sae.tensors.items():
        if name.startswith("trunk."):
            continue
        shape = expected.get(name, [s] if tensor.ndim or name == "b_enc" else [])
        if list(tensor.shape) != shape:
            raise WeightsError(
                f"{name} has shape {list(tensor.shape)}, and W_enc [{h} {s}] asks for {shape}",
                "the file mixes two SAEs, or a matrix is transposed",
            )
    if sae.b_pre_d is not None and list(sae.b_pre_d.shape) != [d]:
        raise WeightsError(f"b_pre has shape {list(sae.b_pre_d.shape)}, and x has {d} dimensions")
    if sae.k is not None and not 0 < sae.k <= s:
        raise WeightsError(f"k = {sae.k} of {s} latents is not possible")
    if isinstance(sae.activation, GroupMax) and s % sae.activation.k:
        raise WeightsError(f"{s} latents are not {sae.activation.k} groups of one size")
    rising = list(sae.prefixes) == sorted(set(sae.prefixes))
    if sae.prefixes and not (rising and sae.prefixes[0] > 0 and sae.prefixes[-1] == s):
        raise WeightsError(f"the prefixes {list(sae.prefixes)} do not rise to d_sae = {s}")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Errors: WeightsError naming the tensor that holds NaN or infinite values."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        # In one sweep, without a mask, in the order of memory; a NaN is both.
        lies_transposed = tensor.ndim == 2 and tensor.T.is_contiguous()
        low, high = (tensor.T if lies_transposed else tensor).aminmax()
        if not (low.isfinite() and high.isfinite()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise WeightsError(
                f"{name} holds {bad} NaN or infinite values of {tensor.numel()}",
                "the SAE diverged in training or its file is damaged: use another checkpoint",
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
