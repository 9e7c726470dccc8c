"""Facts that an SAE's file lacks, from train activations (`saebench estimate`).

With x [n d] the rows that the SAE covers, m their mean [d], v their variance [d] in each dimension:

    standardise  mean m, std √(mean over d of v)                        visaebench's
    zscore       mean m, std √(v·n/(n − 1)) + 1e-6                      CLIP-Scope's
    mean_norm    mean m, std mean(‖x − m‖)/√d                           saev's
    norm         std mean(‖x‖)/√d                                       SAELens's
    threshold    mean over batches of the least value that a top k·b of the batch keeps

All sums are float64. Each is fitted in the passes of `saebench.fit`, in the fixed order of the
train split, so that what comes does not depend on the size of a batch of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.backbones import Backbone
from saebench.fits import CALIBRATION_IMAGES, CHUNK, token_index
from saebench.saes import Sae

ROWS = 4096  # b, of a batch whose top k·b is taken
SCALINGS = ("standardise", "zscore", "mean_norm", "norm")


class _OfTokens:
    """Rows of the chosen tokens of a site, image after image."""

    n_images: int | None = None

    def __init__(
        self, backbone: Backbone, site: str, kinds: Sequence[str], key: Mapping[str, Any]
    ) -> None:
        self.site, self.key = site, {"tokens": list(kinds), **key}
        self.tokens = token_index(backbone, site, kinds)
        self.d = backbone.spec.sites[site].width

    def rows(self, acts_btd: Tensor) -> Tensor:
        return acts_btd[:, self.tokens].reshape(-1, acts_btd.shape[-1])


class Moments(_OfTokens):
    """n, Σx and Σx² [d], Σ‖x‖."""

    kind = "token_moments"

    def __init__(self, backbone: Backbone, site: str, kinds: Sequence[str]) -> None:
        super().__init__(backbone, site, kinds, {})
        self.n, self.norm = 0, 0.0
        self.sum_d, self.square_d = np.zeros(self.d), np.zeros(self.d)

    def update(self, acts_btd: Tensor, tile_bytes: int) -> None:
        for x_nd in self.rows(acts_btd).split(CHUNK):
            x_nd = x_nd.double()
            self.n += x_nd.shape[0]
            self.sum_d += x_nd.sum(dim=0).cpu().numpy()
            self.square_d += x_nd.square().sum(dim=0).cpu().numpy()
            self.norm += float(x_nd.norm(dim=1).sum())

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "n": np.array(self.n),
            "sum_d": self.sum_d,
            "square_d": self.square_d,
            "norm": np.array(self.norm),
        }


class CentredNorm(_OfTokens):
    """Σ‖x − m‖."""

    kind = "token_centred_norm"

    def __init__(
        self, backbone: Backbone, site: str, kinds: Sequence[str], mean_d: Tensor, key: str
    ) -> None:
        super().__init__(backbone, site, kinds, {"moments": key})
        self.mean_d, self.norm = mean_d.double().to(backbone.device), 0.0

    def update(self, acts_btd: Tensor, tile_bytes: int) -> None:
        for x_nd in self.rows(acts_btd).split(CHUNK):
            self.norm += float((x_nd.double() - self.mean_d).norm(dim=1).sum())

    def arrays(self) -> dict[str, np.ndarray]:
        return {"norm": np.array(self.norm)}


class LeastKept(_OfTokens):
    """Of each whole batch of b rows, the least latent that its top k·b keeps; [batches].

    Of fewer than b rows, all are one batch; what is left over behind whole batches is dropped.
    Where fewer than k·b latents are positive, all of them are kept: 0.
    """

    kind = "least_kept"

    def __init__(
        self,
        backbone: Backbone,
        site: str,
        kinds: Sequence[str],
        sae: Sae,
        k: int,
        key: Mapping[str, Any],
    ) -> None:
        """sae: with a threshold of 0, so that its codes are all positive pre-activations."""
        super().__init__(backbone, site, kinds, {**key, "k": k, "rows": ROWS})
        self.sae, self.k = sae, k
        self.left_nd: Tensor | None = None
        self.least: list[float] = []

    def update(self, acts_btd: Tensor, tile_bytes: int) -> None:
        x_nd = self.rows(acts_btd)
        self.left_nd = x_nd if self.left_nd is None else torch.cat([self.left_nd, x_nd])
        while len(self.left_nd) >= ROWS:
            self.least.append(self._least(self.left_nd[:ROWS], tile_bytes))
            self.left_nd = self.left_nd[ROWS:]
        self.tile_bytes = tile_bytes

    def arrays(self) -> dict[str, np.ndarray]:
        if not self.least and self.left_nd is not None:
            self.least.append(self._least(self.left_nd, self.tile_bytes))
        return {"least": np.array(self.least)}

    def _least(self, x_nd: Tensor, tile_bytes: int) -> float:
        n_kept = self.k * len(x_nd)
        kept = x_nd.new_zeros(0)
        # A code takes an index and a value where a pre-activation takes a value.
        for tile_nd in x_nd.split(max(1, tile_bytes // (16 * self.sae.d_sae))):
            values = self.sae.encode(tile_nd, tile_bytes=tile_bytes).values_m
            kept = torch.cat([kept, values[values > 0]])
            if len(kept) > n_kept:
                kept = kept.topk(n_kept, sorted=False).values
        return float(kept.min()) if len(kept) == n_kept else 0.0


class Outcome(_OfTokens):
    """What the SAE does with the facts that were found: n, ΣL0, Σ‖x − x̂‖², Σ‖x − m‖²."""

    kind, n_images = "sae_outcome", CALIBRATION_IMAGES

    def __init__(
        self,
        backbone: Backbone,
        site: str,
        kinds: Sequence[str],
        sae: Sae,
        mean_d: Tensor,
        key: Mapping[str, Any],
    ) -> None:
        super().__init__(backbone, site, kinds, key)
        self.sae, self.mean_d = sae, mean_d.double().to(backbone.device)
        self.n, self.l0, self.residual, self.total = 0, 0, 0.0, 0.0

    def update(self, acts_btd: Tensor, tile_bytes: int) -> None:
        for x_nd in self.rows(acts_btd).split(CHUNK):
            codes = self.sae.encode(x_nd, tile_bytes=tile_bytes)
            self.n += codes.n_rows
            self.l0 += codes.n_nonzero
            if not self.sae.transcoder:
                gap_nd = x_nd.double() - self.sae.decode(codes).double()
                self.residual += float(gap_nd.square().sum())
            self.total += float((x_nd.double() - self.mean_d).square().sum())

    def arrays(self) -> dict[str, np.ndarray]:
        numbers = {"n": self.n, "l0": self.l0, "residual": self.residual, "total": self.total}
        return {name: np.array(value) for name, value in numbers.items()}


def mean_of(moments: Mapping[str, np.ndarray]) -> Tensor:
    """m [d], float64."""
    return torch.from_numpy(moments["sum_d"] / max(int(moments["n"]), 1))


def scaling_facts(
    how: str, moments: Mapping[str, np.ndarray], centred_norm: float | None = None
) -> dict[str, Tensor]:
    """input_mean and input_std by one of `SCALINGS`; centred_norm: Σ‖x − m‖, for mean_norm."""
    n, mean_d = int(moments["n"]), mean_of(moments)
    var_d = (torch.from_numpy(moments["square_d"]) / n - mean_d.square()).clamp(min=0)
    root_d = len(mean_d) ** 0.5
    if how == "norm":
        return {"input_std": torch.tensor(float(moments["norm"]) / n / root_d)}
    if how == "standardise":
        return {"input_mean": mean_d, "input_std": var_d.mean().sqrt()}
    if how == "zscore":
        return {"input_mean": mean_d, "input_std": (var_d * n / max(n - 1, 1)).sqrt() + 1e-6}
    assert how == "mean_norm"
    assert centred_norm is not None
    return {"input_mean": mean_d, "input_std": torch.tensor(centred_norm / n / root_d)}
