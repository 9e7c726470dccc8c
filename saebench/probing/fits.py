"""The probes of one unit, fitted on what was collected of train images: each an artifact.

    x        on clean features; the frozen probe is this one, and all coders there share it
    xhat     on reconstructions
    codes    on the codes of an image, by pooling
    sparse   on the k latents that tell classes apart best, k in SPARSE, on codes of the default
             pooling, ranked on the train images that are not held back
    tree     a decision tree on the best of the same ranking, and
    single   the best single latent of each class: on all images that the last fit of a probe sees

All by the same split and solver, over features centred by their own train mean and divided by one
scalar. A dictionary so large that a probe of it would have more than LARGEST coefficients (with
ridge, of more than BEST latents) is read by its BEST best-ranked latents: a variant, which says so.
Features of up to IN_MEMORY bytes are fitted in memory, more from the files they lie in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from saebench.heads import PROBE
from saebench.moving import moved
from saebench.probe import DenseRows, Probe, Rows, fit_probe
from saebench.probe.mapped import MappedRows
from saebench.probe.ranking import rank_latents
from saebench.probe.ridge import fit_ridge
from saebench.probe.single import CANDIDATES, SingleLatents, fit_single
from saebench.probe.tree import ROWS, Tree, fit_tree
from saebench.probe_features import Pooling
from saebench.probe_options import BEST, LARGEST, SPARSE
from saebench.probing.collected import Asked, Collected
from saebench.probing.probes import Fitted, Probes
from saebench.probing.sample import Sample
from saebench.probing.stored import arrays_of, fitted_of, on_device
from saebench.probing.train_codes import LOOKED, TrainCodes
from saebench.store import Store

IN_MEMORY = 2**31  # bytes of features

T = TypeVar("T")


class Missing(Exception):
    """An artifact that the store does not have, while there is nothing to fit it on."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """The probes that a unit asks for. d_codes: latents of an image's codes.

    keys: `x`, `xhat`, `codes` -> everything that can change these features. missing: `xhat` or
    `codes` -> why there are none of them.
    """

    asked: Asked
    sample: Sample
    n_classes: int
    d_codes: int
    solver: str
    seed: int
    keys: Mapping[str, Mapping[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)
    label: str = ""
    variant: Mapping[str, Any] = field(default_factory=dict)
    taxonomy: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def n_fits(self) -> int:
        """How many artifacts its probes are."""
        if "codes" in self.missing:
            return 2 - ("xhat" in self.missing)
        of_codes = len(self.asked.feature.poolings) + sum(k <= self.d_codes for k in SPARSE)
        return 2 - ("xhat" in self.missing) + of_codes + 2  # a tree, single latents

    @property
    def restricted(self) -> bool:
        """Whether its dictionary is too large for a probe of all of it."""
        large = self.solver == "ridge" or self.d_codes * self.n_classes > LARGEST
        return large and self.d_codes > BEST


@dataclass(frozen=True, eq=False)
class Fits:
    """Makes the probes of a unit: out of the store alone, or where they are not, of `collected`."""

    wanted: Wanted
    store: Store
    device: torch.device
    collected: Collected | None = None
    say: Callable[[str], None] = lambda what: None  # before something is fitted
    step: Callable[[], None] = lambda: None  # after each artifact, fitted or found
    _rankings: dict[Pooling, Tensor] = field(default_factory=dict, repr=False)

    def probes(self) -> Probes:
        """All of them. Errors: Missing where one is neither there nor to be fitted."""
        wanted, feature = self.wanted, self.wanted.asked.feature
        x = self._dense("x")
        xhat = None if "xhat" in wanted.missing else self._dense("xhat")
        codes: dict[Pooling, Fitted] = {}
        sparse: dict[int, Fitted] = {}
        tree = single = None
        looked: dict[str, int] = {}
        if "codes" not in wanted.missing:
            usual = feature.poolings[0]
            codes = {pooling: self._codes(pooling) for pooling in feature.poolings}
            sparse = {k: self._sparse(usual, k) for k in SPARSE if k <= wanted.d_codes}
            tree, looked["tree"] = self._tree(usual)
            single, looked["single"] = self._single(usual)
        return Probes(
            feature,
            wanted.label,
            wanted.n_classes,
            x,
            xhat,
            codes,
            sparse,
            tree,
            single,
            wanted.missing,
            {"feature": feature.name, "n_train": self._n_train},
            wanted.variant,
            wanted.taxonomy,
            looked,
        )

    # What is fitted

    def _dense(self, what: Literal["x", "xhat"]) -> Fitted:
        def fit(device: torch.device) -> Probe:
            return self._solved(self._features(what, device))

        arrays = self._get("probe_dense", what, {}, lambda: arrays_of(on_device(self.device, fit)))
        return self._fitted(arrays)

    def _codes(self, pooling: Pooling) -> Fitted:
        restricted = self.wanted.restricted

        def fit(device: torch.device) -> Mapping[str, np.ndarray]:
            codes, latents_k = self._train_codes(pooling), None
            if restricted:
                latents_k = self._ranked(pooling)[:BEST].sort().values
                folder = self.store.root if os.access(self.store.root, os.W_OK) else None
                codes = codes.only(latents_k, folder)
            found = arrays_of(self._solved(codes.rows(self._labels, device)), latents_k)
            return {**found, **self._ranked_by(pooling)} if restricted else found

        fields: dict[str, Any] = {"pooling": pooling, "latents": BEST if restricted else None}
        if restricted:
            fields["looked"] = LOOKED
        arrays = self._get("probe_codes", "codes", fields, lambda: on_device(self.device, fit))
        return self._fitted(arrays, {"latents": BEST} if restricted else {}, large=True)

    def _sparse(self, pooling: Pooling, k: int) -> Fitted:
        def fit(device: torch.device) -> Mapping[str, np.ndarray]:
            latents_k = self._ranked(pooling)[:k]
            rows = self._train_codes(pooling).columns(latents_k, self._labels, device)
            return arrays_of(self._solved(rows), latents_k) | self._ranked_by(pooling)

        fields = {"pooling": pooling, "k": k, "looked": LOOKED}
        return self._fitted(
            self._get("probe_sparse", "codes", fields, lambda: on_device(self.device, fit))
        )

    def _tree(self, pooling: Pooling) -> tuple[Tree, int]:
        """And how many images it was fitted on."""

        def fit() -> Mapping[str, np.ndarray]:
            parts, ranked_d = self._of_last_fit(pooling), self._ranked(pooling)
            tree = fit_tree(*parts, ranked_d, seed=self.wanted.seed)
            return {**tree.arrays(), "n_train": np.array(min(len(parts[0]) - 1, ROWS))}

        seed = self.wanted.seed
        fields = {"pooling": pooling, "solver": None, "seed": seed, "looked": LOOKED}
        arrays = self._get("probe_tree", "codes", fields, fit)
        return moved(Tree.of(arrays), self.device), int(arrays["n_train"])

    def _single(self, pooling: Pooling) -> tuple[SingleLatents, int]:
        """And how many images they were fitted on."""

        def fit() -> Mapping[str, np.ndarray]:
            parts = self._of_last_fit(pooling)
            return {**fit_single(*parts).arrays(), "n_train": np.array(len(parts[0]) - 1)}

        fields = {"pooling": pooling, "solver": None, "tried": CANDIDATES, "looked": LOOKED}
        arrays = self._get("probe_single", "codes", fields, fit)
        return moved(SingleLatents.of(arrays), self.device), int(arrays["n_train"])

    def _solved(self, rows: Rows) -> Probe:
        wanted = self.wanted
        fit = fit_ridge if wanted.solver == "ridge" else fit_probe
        held_n = self._held_n.to(rows.device)
        return fit(rows, held_n, wanted.n_classes, refit=wanted.sample.refit)

    def _fitted(
        self,
        arrays: Mapping[str, np.ndarray],
        variant: Mapping[str, Any] | None = None,
        *,
        large: bool = False,
    ) -> Fitted:
        return fitted_of(
            arrays,
            solver=self.wanted.solver,
            n_train=self._n_train,
            device=self.device,
            variant=variant,
            large=large,
        )

    # What it is fitted on

    @property
    def _there(self) -> Collected:
        if self.collected is None:
            raise Missing
        return self.collected

    @property
    def _labels(self) -> Tensor:
        return torch.from_numpy(self.wanted.sample.labels[self._there.present])

    @property
    def _held_n(self) -> Tensor:
        return torch.from_numpy(self.wanted.sample.held[self._there.present])

    @property
    def _n_train(self) -> int:
        """Images that the last fit of a probe sees."""
        sample = self.wanted.sample
        present = slice(None) if self.collected is None else self.collected.present
        held = sample.held[present]
        return len(held) if sample.refit else int((~held).sum())

    def _features(self, what: Literal["x", "xhat"], device: torch.device) -> Rows:
        parts = self._there.dense(self.wanted.asked, what)
        if sum(part.nbytes for part in parts) > IN_MEMORY:
            return MappedRows.of(parts, self._labels, device=device)
        x_nd = torch.from_numpy(np.concatenate(parts)).to(device)
        return DenseRows.of(x_nd, self._labels.to(device))

    def _train_codes(self, pooling: Pooling) -> TrainCodes:
        parts = self._there.code_parts(self.wanted.asked, pooling)
        offsets_n1 = self._there.offsets(self.wanted.asked, pooling)
        return TrainCodes(offsets_n1, parts, self.wanted.d_codes)

    def _of_last_fit(self, pooling: Pooling) -> tuple[Tensor, Tensor, Tensor, int, Tensor, int]:
        """Codes, width, labels, number of classes of the images that a probe's last fit sees."""
        held_n = self._held_n
        keep_n = torch.ones_like(held_n) if self.wanted.sample.refit else ~held_n
        return self._looked(pooling, keep_n)

    def _looked(
        self, pooling: Pooling, keep_n: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, int, Tensor, int]:
        """The same of the images that are kept, as many as are looked at together."""
        train = self._train_codes(pooling)
        codes, labels_n = train.looked(keep_n), self._labels[: train.n_looked]
        labels_n = labels_n[keep_n[: train.n_looked]]
        parts = codes.offsets_n1, codes.indices_m, codes.values_m
        return *parts, codes.d_sae, labels_n, self.wanted.n_classes

    def _ranked(self, pooling: Pooling) -> Tensor:
        """[d] int64: latents, the best first, by the images that are not held back."""
        if pooling not in self._rankings:
            self._rankings[pooling] = rank_latents(*self._looked(pooling, ~self._held_n))
        return self._rankings[pooling]

    def _ranked_by(self, pooling: Pooling) -> dict[str, np.ndarray]:
        """By how many of the first images latents were ranked, and of how many."""
        train = self._train_codes(pooling)
        return {"ranked_by": np.array([train.n_looked, train.n])}

    # Where it is kept, and where computed

    def _get(
        self,
        kind: str,
        what: str,
        fields: Mapping[str, Any],
        build: Callable[[], Mapping[str, np.ndarray]],
    ) -> Mapping[str, np.ndarray]:
        """The arrays of a fit, out of the store where they are. Errors: Missing."""
        wanted, collected = self.wanted, self.collected
        key = {
            "features": wanted.keys[what],
            "sample": wanted.sample.key,
            "probe": PROBE,
            "solver": wanted.solver,
            "classes": wanted.n_classes,
            **fields,
        }
        if collected is None:
            found = self.store.find(kind, key, mapped=True)
            if found is None:
                raise Missing
            return found.arrays
        if collected.left_out:
            key["left_out"] = collected.left_out

        def told() -> Mapping[str, np.ndarray]:
            self.say(_in_words(kind, what, fields))
            return build()

        arrays = self.store.get(kind, key, told, mapped=True).arrays
        self.step()
        return arrays


def _in_words(kind: str, what: str, fields: Mapping[str, Any]) -> str:
    """What is fitted, for people."""
    if kind == "probe_dense":
        return "the probe on clean features" if what == "x" else "the probe on its reconstructions"
    if kind == "probe_tree":
        return "the tree on its codes"
    if kind == "probe_single":
        return "the best latent of each class"
    number = fields.get("k") or fields.get("latents")
    best = f"the best {number} of " if number else ""
    pooled = "" if fields["pooling"] == "none" else f", {fields['pooling']} over tokens"
    return f"the probe on {best}its codes{pooled}"
