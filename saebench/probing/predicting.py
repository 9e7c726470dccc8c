"""The probes of one unit, applied to test images: what each says of the images of a batch.

What does not depend on the SAE, the probe on x, is applied once per batch for all SAEs on the same
tokens, under a key made of its weights. Where a reconstruction is x bit for bit it is not applied
again, nor is a refitted probe that is bit for bit that of x: no rounding can tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from saebench.codes import Codes
from saebench.errors import DataError, SaebenchError
from saebench.finite import all_finite
from saebench.metrics.bootstrap import REPLICATES, weights_of
from saebench.metrics.probing import Level, Said, levels_of, said, said_class
from saebench.probe.single import SingleLatents
from saebench.probing.features import clean_features, pooled_codes, reconstructed_features
from saebench.probing.probes import Fitted, Probes, only
from saebench.task import Batch

IMAGES = 1024  # sums of single latents are taken of so many at once


@dataclass(frozen=True, eq=False)
class Applied:
    """What the probes say of a batch, by slot; its labels, and its codes by the default pooling."""

    labels_b: Tensor
    slots: Mapping[str, Said]
    codes: Codes | None = None


class Predictor:
    """Slots: x, xhat_frozen, xhat_refit, codes/<pooling>, k1 …, tree; and <slot>@<level>."""

    def __init__(self, probes: Probes, *, scores: bool, xhat: bool) -> None:
        """scores: what the probes give is no log-odds. xhat: whether there are reconstructions."""
        self.probes, self.scores, self.xhat = probes, scores, xhat
        self.levels = levels_of({} if scores else probes.taxonomy, probes.x.W_dc.device)

    def labels(self, batch: Batch) -> Tensor:
        """[b] int64. Errors: DataError for a label that the probes have no class for."""
        n_classes, level = self.probes.n_classes, self.probes.label
        labels = batch.levels[level] if level else batch.labels
        if not 0 <= labels.min() <= labels.max() < n_classes:
            raise DataError(
                f"the labels of the images go from {labels.min()} to {labels.max()}, and the "
                f"probes tell {n_classes} classes apart",
                "the test split has to have the classes of the train split",
            )
        return torch.as_tensor(labels, device=self.probes.x.W_dc.device)

    def __call__(self, batch: Batch) -> Applied:
        """Errors: DataError; SaebenchError for logits that are not finite; those of `SaeBatch`."""
        labels_b = self.labels(batch)
        of_x = self._of_x(batch, labels_b)
        found = _named("x", of_x)
        if self.xhat:
            found |= self._of_xhat(batch, labels_b, of_x)
        if not self.probes.codes:
            return Applied(labels_b, found)
        feature = self.probes.feature
        default, *others = self.probes.codes
        z = pooled_codes(batch, feature, default)
        of_codes = self._say(self.probes.codes[default], z, labels_b, batch, self.levels)
        found |= _named(f"codes/{default}", of_codes)
        for pooling in others:
            codes, fitted = pooled_codes(batch, feature, pooling), self.probes.codes[pooling]
            found |= _named(f"codes/{pooling}", self._say(fitted, codes, labels_b, batch))
        found |= self._of_few(z, labels_b, batch)
        if self.probes.tree is not None:
            class_b = self.probes.tree.predict(z.offsets_n1, z.indices_m, z.values_m)
            found["tree"] = said_class(class_b.to(labels_b.device), labels_b)
        return Applied(labels_b, found, z)

    def _of_few(self, codes: Codes, labels_b: Tensor, batch: Batch) -> dict[str, Said]:
        """Of the k-sparse probes: the codes of all their latents are looked up once, dense."""
        few = {k: (one, one.latents_k) for k, one in self.probes.sparse.items()}
        latents = [latents_k for _, latents_k in few.values() if latents_k is not None]
        if not latents:
            return {}
        all_u = torch.cat(latents).unique()
        z_bu = only(codes, all_u).dense()
        found: dict[str, Said] = {}
        for k, (fitted, latents_k) in few.items():
            z = codes if latents_k is None else z_bu[:, torch.searchsorted(all_u, latents_k)]
            found |= _named(f"k{k}", self._say(fitted, z, labels_b, batch))
        return found

    def _of_x(self, batch: Batch, labels_b: Tensor) -> dict[str, Said]:
        def compute() -> dict[str, Said]:
            features_bf = clean_features(batch, self.probes.feature)
            return self._say(self.probes.x, features_bf, labels_b, batch, self.levels)

        key = f"linear_probe: x: {self.probes.feature.name}: {self._hash}"
        if self.probes.feature.name == "embedding":
            return batch.shared_by_all(f"{key}: {batch.clean_name}", compute)
        return batch.shared(key, compute)

    @cached_property
    def _hash(self) -> str:
        """Of all that what is said of x follows from, but for the features."""
        digest = blake2b(f"{self.probes.label}\0{self.scores}".encode(), digest_size=16)
        for tensor in (self.probes.x.W_dc, self.probes.x.b_c):
            digest.update(str(list(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        for name, level in self.levels.items():
            digest.update(f"{name}\0".encode())
            digest.update(level.value_c.cpu().numpy().data)
        return digest.hexdigest()

    def _of_xhat(self, batch: Batch, labels_b: Tensor, of_x: Mapping[str, Said]) -> dict[str, Said]:
        x_bf = clean_features(batch, self.probes.feature)
        xhat_bf = reconstructed_features(batch, self.probes.feature)
        same = torch.equal(x_bf, xhat_bf)

        def say(fitted: Fitted) -> Mapping[str, Said]:
            return self._say(fitted, xhat_bf, labels_b, batch, self.levels)

        frozen = of_x if same else say(self.probes.x)
        found = _named("xhat_frozen", frozen)
        if self.probes.xhat is not None:
            refitted = frozen if self._same_probe else say(self.probes.xhat)
            found |= _named("xhat_refit", refitted)
        return found

    @cached_property
    def _same_probe(self) -> bool:
        x, xhat = self.probes.x, self.probes.xhat
        if xhat is None:
            return False
        return torch.equal(x.W_dc, xhat.W_dc) and torch.equal(x.b_c, xhat.b_c)

    def _say(
        self,
        fitted: Fitted,
        features: Tensor | Codes,
        labels_b: Tensor,
        batch: Batch,
        levels: Mapping[str, Level] | None = None,
    ) -> dict[str, Said]:
        logits_bc = fitted.logits(features)
        if not all_finite(logits_bc):
            raise SaebenchError(
                f"the logits of a probe are NaN or infinite near image {batch.ids[0]}",
                "look at the activations, the reconstructions and the codes of that image",
            )
        return said(logits_bc, labels_b, levels or {}, scores=self.scores)


def _named(slot: str, found: Mapping[str, Said]) -> dict[str, Said]:
    return {f"{slot}@{level}" if level else slot: one for level, one in found.items()}


class SingleCodes:
    """A `Part`: the codes of each image, in order, of the latents that are some class's single one.

    The sums of a class (`probe.single`) are taken of them in the end: for each replicate of every
    class they would be larger.
    """

    def __init__(self, single: SingleLatents) -> None:
        self.single = single
        self._latents_k = single.latent_c[single.latent_c >= 0].unique()
        self._arrays: dict[str, list[np.ndarray]] = {}

    def add(self, codes: Codes) -> None:
        own = only(codes, self._latents_k)
        small = np.min_scalar_type(len(self._latents_k))
        self.merge(
            {
                "counts": own.l0_n().int().cpu().numpy(),
                "latents": own.indices_m.cpu().numpy().astype(small),
                "values": own.values_m.float().cpu().numpy(),
            }
        )

    def sums(
        self, keys_n: np.ndarray, labels_n: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The CE [c], that of each replicate [c R], and the prevalences [c].

        keys: of the bootstrap; they and the labels are those of the images, in the same order.
        """
        state, c = self.state(), len(self.single.latent_c)
        latents_k = self._latents_k

        def moved(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(latents_k.device)

        offsets_n1 = np.concatenate([[0], state["counts"].cumsum(dtype=np.int64)])
        ce_c, ce_cr = np.zeros(c), np.zeros((c, REPLICATES))
        for start in range(0, len(keys_n), IMAGES):
            own = slice(start, start + IMAGES)
            own_b1 = offsets_n1[start : start + IMAGES + 1]
            inside = slice(own_b1[0], own_b1[-1])
            found = self.single.sums(
                moved(own_b1 - own_b1[0]),
                latents_k[moved(state["latents"][inside].astype(np.int64))],
                moved(state["values"][inside]),
                moved(labels_n[own]),
                moved(weights_of(keys_n[own])),
            )
            ce_c += found.latent_c.cpu().numpy()
            ce_cr += found.latent_cr.cpu().numpy()
        return ce_c, ce_cr, self.single.prevalence_c.cpu().numpy()

    def state(self) -> dict[str, np.ndarray]:
        self._arrays = {name: [np.concatenate(some)] for name, some in self._arrays.items()}
        return {name: array for name, (array,) in self._arrays.items()}

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        for name, array in state.items():
            self._arrays.setdefault(name, []).append(array)
