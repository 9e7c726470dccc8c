"""What train rows say of a site and of the SAEs there: sums over its tokens, in float64.

    site_mean     per token kind: n and the sum of x                        [kinds], [kinds d]
    site_scatter  per token kind: the sum of x xᵀ                           [kinds d d]
    sae_l0        an SAE's mean L0 on train tokens                          scalar
    random_scale  the least-squares scale of an `@random` control           scalar

Each is a `saebench.fit.SiteFit`. The first three can be fitted in one pass; the last needs their
values, so it takes a second, short one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from saebench.backbones import Backbone
from saebench.images import rebased
from saebench.saes import Coder

CALIBRATION_IMAGES = 256  # train images that an L0 and a control's scale are measured on
CHUNK = 16_384  # rows whose float64 copy is held at once


class SiteMean:
    """n and Σx of every token kind at a site."""

    kind, n_images = "site_mean", None

    def __init__(self, backbone: Backbone, site: str) -> None:
        self.site, self.key = site, dict[str, Any]()
        self.layout = backbone.spec.sites[site].kinds
        width = backbone.spec.sites[site].width
        self.n_k = np.zeros(len(self.layout), dtype=np.int64)
        self.sum_kd = np.zeros((len(self.layout), width))

    def update(self, acts_btd: torch.Tensor, tile_bytes: int) -> None:
        for i, part in enumerate(self.layout.values()):
            x_nd = acts_btd[:, part].reshape(-1, acts_btd.shape[-1])
            self.n_k[i] += x_nd.shape[0]
            self.sum_kd[i] += x_nd.sum(dim=0, dtype=torch.float64).cpu().numpy()

    def arrays(self) -> dict[str, np.ndarray]:
        return {"n_k": self.n_k, "sum_kd": self.sum_kd}


class SiteScatter:
    """Σ x xᵀ of every token kind at a site, in float64."""

    kind, n_images = "site_scatter", None

    def __init__(self, backbone: Backbone, site: str) -> None:
        self.site, self.key = site, dict[str, Any]()
        self.layout = backbone.spec.sites[site].kinds
        width = backbone.spec.sites[site].width
        self.scatter_kdd = torch.zeros(
            (len(self.layout), width, width), dtype=torch.float64, device=backbone.device
        )

    def update(self, acts_btd: torch.Tensor, tile_bytes: int) -> None:
        for i, part in enumerate(self.layout.values()):
            for x_nd in acts_btd[:, part].reshape(-1, acts_btd.shape[-1]).split(CHUNK):
                x_nd = x_nd.double()
                self.scatter_kdd[i].addmm_(x_nd.T, x_nd)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"scatter_kdd": self.scatter_kdd.cpu().numpy()}


class SaeL0:
    """Mean L0 of an SAE over the tokens that it covers."""

    kind, n_images = "sae_l0", CALIBRATION_IMAGES

    def __init__(
        self,
        backbone: Backbone,
        site: str,
        kinds: Sequence[str],
        sae: Coder,
        key: Mapping[str, Any],
    ) -> None:
        self.site, self.key, self.sae = site, {"sae": key}, sae
        self.tokens = token_index(backbone, site, kinds)
        self.total, self.n = 0, 0

    def update(self, acts_btd: torch.Tensor, tile_bytes: int) -> None:
        x_nd = acts_btd[:, self.tokens].reshape(-1, acts_btd.shape[-1])
        self.total += int(self.sae.encode(x_nd, tile_bytes=tile_bytes).l0_n().sum())
        self.n += x_nd.shape[0]

    def arrays(self) -> dict[str, np.ndarray]:
        return {"l0": np.array(self.total / self.n)}


class RandomScale:
    """The scale a that minimises Σ‖x − b − a·u‖², u the unscaled control's reconstruction − b."""

    kind, n_images = "random_scale", CALIBRATION_IMAGES

    def __init__(
        self,
        backbone: Backbone,
        site: str,
        kinds: Sequence[str],
        unscaled: Coder,
        bias_d: torch.Tensor,
        key: Mapping[str, Any],
    ) -> None:
        self.site, self.key, self.unscaled, self.bias_d = site, {"control": key}, unscaled, bias_d
        self.tokens = token_index(backbone, site, kinds)
        self.dot, self.square = 0.0, 0.0

    def update(self, acts_btd: torch.Tensor, tile_bytes: int) -> None:
        x_nd = acts_btd[:, self.tokens].reshape(-1, acts_btd.shape[-1])
        codes = self.unscaled.encode(x_nd, tile_bytes=tile_bytes)
        u_nd = (self.unscaled.decode(codes) - self.bias_d).double()
        self.dot += float((u_nd * (x_nd - self.bias_d).double()).sum())
        self.square += float(u_nd.square().sum())

    def arrays(self) -> dict[str, np.ndarray]:
        return {"scale": np.array(self.dot / self.square if self.square else 0.0)}


def token_index(backbone: Backbone, site: str, kinds: Sequence[str]) -> slice | torch.Tensor:
    """Index of the chosen kinds' tokens at a site: a slice where they lie together."""
    layout = backbone.spec.sites[site].kinds
    chosen = [layout[kind] for kind in layout if kind in kinds]
    if all(a.stop == b.start for a, b in pairwise(chosen)):
        return slice(chosen[0].start, chosen[-1].stop)
    return torch.cat([torch.arange(part.start, part.stop) for part in chosen])


def kind_means(
    arrays: Mapping[str, np.ndarray], layout: Mapping[str, slice]
) -> dict[str, np.ndarray]:
    """Token kind -> mean of x, [d] float64, from `site_mean`."""
    return {
        kind: arrays["sum_kd"][i] / max(int(arrays["n_k"][i]), 1) for i, kind in enumerate(layout)
    }


def overall_mean(
    arrays: Mapping[str, np.ndarray], layout: Mapping[str, slice], kinds: Sequence[str]
) -> np.ndarray:
    """Mean of x over all tokens of the chosen kinds, [d] float64."""
    index = [i for i, kind in enumerate(layout) if kind in kinds]
    return arrays["sum_kd"][index].sum(axis=0) / max(int(arrays["n_k"][index].sum()), 1)


def mean_per_token(
    arrays: Mapping[str, np.ndarray], layout: Mapping[str, slice], kinds: Sequence[str]
) -> np.ndarray:
    """[t d]: for each token that is covered, the train mean of its kind."""
    means = kind_means(arrays, layout)
    parts = rebased(layout, kinds)
    return np.concatenate(
        [
            np.repeat(means[kind][None], part.stop - part.start, axis=0)
            for kind, part in parts.items()
        ]
    )


def principal_components(
    mean: Mapping[str, np.ndarray],
    scatter: Mapping[str, np.ndarray],
    layout: Mapping[str, slice],
    kinds: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [d], eigenvalues [d] (variance, falling) and basis [d d] (columns) of the train tokens.

    Signs are fixed (each column's largest entry is positive), so that the basis is reproducible.
    """
    index = [i for i, kind in enumerate(layout) if kind in kinds]
    n = int(mean["n_k"][index].sum())
    mean_d = overall_mean(mean, layout, kinds)
    covariance_dd = scatter["scatter_kdd"][index].sum(axis=0) / n - np.outer(mean_d, mean_d)
    values_d, basis_dd = np.linalg.eigh(covariance_dd)
    values_d, basis_dd = values_d[::-1].copy(), basis_dd[:, ::-1].copy()
    signs = np.sign(basis_dd[np.abs(basis_dd).argmax(axis=0), np.arange(basis_dd.shape[1])])
    return mean_d, values_d, basis_dd * np.where(signs == 0, 1.0, signs)
