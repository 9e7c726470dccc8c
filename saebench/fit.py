"""What must be known before the evaluation pass, fitted on the train split only.

    site_mean     per token kind: n and the sum of x                        [kinds], [kinds d]
    site_scatter  per token kind: the sum of x xᵀ                           [kinds d d]
    sae_l0        an SAE's mean L0 on train tokens                          scalar
    random_scale  the least-squares scale of an `@random` control           scalar

All are float64 sums over the first images of the train split in its fixed order. Each is an
artifact of the store, keyed by everything that can change it, and shared by all runs. The first
three are fitted in one pass; the last needs their values, so it takes a second, short one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch

from saebench.backbones import Backbone
from saebench.data import Dataset
from saebench.data.loader import batches
from saebench.errors import DataError, is_out_of_memory
from saebench.identity import content_hash
from saebench.images import check_finite, rebased
from saebench.saes import Coder
from saebench.specs import semantic_fields
from saebench.store import Artifact, Store
from saebench.tiles import Tiles
from saebench.units import PROTOCOL, Source

CALIBRATION_IMAGES = 256  # train images that an L0 and a control's scale are measured on
CHUNK = 16_384  # rows whose float64 copy is held at once


class Fit(Protocol):
    """One artifact being fitted: sees train activations, then gives arrays."""

    @property
    def kind(self) -> str: ...
    @property
    def site(self) -> str: ...
    @property
    def n_images(self) -> int | None: ...  # first train images; None: all that statistics see
    @property
    def key(self) -> Mapping[str, Any]: ...
    def update(self, acts_btd: torch.Tensor, tile_bytes: int) -> None: ...
    def arrays(self) -> dict[str, np.ndarray]: ...


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


@dataclass(frozen=True)
class Fitter:
    """Fits artifacts of one backbone on one dataset's train split, each once for everybody."""

    backbone: Backbone
    dataset: Dataset
    source: Source
    store: Store
    identity: Callable[[str], Mapping[str, Any]]  # site -> identity of the backbone there
    dtype: str
    tiles: Tiles
    workers: int = 0
    bad_images: Literal["fail", "skip"] = "fail"
    on_images: Callable[[int], None] = lambda n: None
    on_bad: Callable[[str, int, str], None] = lambda split, row, why: None

    def fit(self, makers: Sequence[Callable[[], Fit]]) -> list[Artifact]:
        """The artifact of each, from the store where it is, else from one pass for all.

        Each maker gives an empty fit; a pass that runs out of memory begins again with new ones.
        A fit of which images were left out is another artifact, and made anew in every run: only a
        pass tells which images still do not decode.
        Errors: NonFiniteError (NaN or infinite train activations: nothing is stored), DataError
        (an image that does not decode, or none that does).
        """
        fits = [make() for make in makers]
        found = [self.store.find(fit.kind, self._key(fit)) for fit in fits]
        missing = [i for i, artifact in enumerate(found) if artifact is None]
        fitted, bad = self._pass([makers[i] for i in missing])
        made = dict(zip(missing, fitted, strict=True))
        artifacts = []
        for i, artifact in enumerate(found):
            if artifact is None:
                fit = made[i]
                key = self._key(fit) | self._left_out(fit, bad)
                artifact = self.store.get(fit.kind, key, fit.arrays)
            artifacts.append(artifact)
        return artifacts

    def _key(self, fit: Fit) -> dict[str, Any]:
        return {
            "backbone": self.identity(fit.site),
            "dataset": {"name": self.source.spec.name, **semantic_fields(self.source.spec)},
            "train": self.source.train_sha256,
            "n_images": self._n_images(fit),
            "dtype": self.dtype,
            "protocol": PROTOCOL,
            **fit.key,
        }

    def _n_images(self, fit: Fit) -> int:
        return min(fit.n_images or self.source.n_train, self.source.n_train)

    def _left_out(self, fit: Fit, bad: Mapping[int, str]) -> dict[str, Any]:
        """What the key of a fit says of its images that were left out: bad is place -> id."""
        ids = [bad[place] for place in sorted(bad) if place < self._n_images(fit)]
        if len(ids) == self._n_images(fit):
            raise DataError(
                f"none of the {len(ids)} images of '{self.source.spec.name}', split "
                f"'{self.source.spec.train}', that statistics are fitted on can be decoded",
                "the first of them, and why, are in the list of bad images",
            )
        return {"left_out": content_hash(ids)} if ids else {}

    def _pass(self, makers: Sequence[Callable[[], Fit]]) -> tuple[list[Fit], dict[int, str]]:
        """The fits after their pass, and the images that were left out: place -> id."""
        while True:
            fits = [make() for make in makers]
            try:
                return fits, self._see_images(fits) if fits else {}
            except Exception as error:
                if not (is_out_of_memory(error) and self.tiles.halve()):
                    raise
                error.__traceback__ = None  # it holds the frames that hold the memory
                del fits

    def _see_images(self, fits: Sequence[Fit]) -> dict[int, str]:
        last = max(self._n_images(fit) for fit in fits)
        split = self.source.spec.train
        manifest = self.dataset.manifest(split)
        order = manifest.order(last)
        place = {row: i for i, row in enumerate(order.tolist())}
        bad: dict[int, str] = {}

        def left_out(row: int, why: str) -> None:
            bad[place[row]] = manifest.ids[row]
            self.on_bad(split, row, why)

        stream = batches(
            self.dataset,
            split,
            order,
            self.backbone.transform,
            self.tiles.batch_size,
            self.workers,
            bad_images=self.bad_images,
            on_bad=left_out,
        )
        for index, images_b3hw in stream:
            # Each fit sees its own first images exactly, whatever else is fitted in the pass.
            places = np.array([place[row] for row in index.tolist()])
            own = {id(fit): int((places < self._n_images(fit)).sum()) for fit in fits}
            sites = sorted({fit.site for fit in fits if own[id(fit)]})
            captures = self.backbone.acts(images_b3hw, sites)
            for site in sites:
                acts_btd = captures[site].acts_btd.float()
                check_finite(acts_btd, self.backbone, site, manifest.ids[int(index[0])])
                for fit in fits:
                    if fit.site == site and own[id(fit)]:
                        fit.update(acts_btd[: own[id(fit)]], self.tiles.tile_bytes)
            self.on_images(len(index))
        return bad


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
