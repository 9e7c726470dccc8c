"""Synthetic activations whose features are known, and short ways to train on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from saebench.train.fit import Fitted, Measured, fit, measure
from saebench.train.recipe import PENALISED, Arch, Recipe
from saebench.train.stream import Rows, Stream

WIDTH, FEATURES, ACTIVE = 24, 48, 3.0
CPU = torch.device("cpu")


def known_features(n: int = 20_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(x [n d] float32, features [f d] unit rows): sparse sums of features, noise, a large mean."""
    rng = np.random.default_rng(seed)
    features_fd = rng.normal(size=(FEATURES, WIDTH))
    features_fd /= np.linalg.norm(features_fd, axis=1, keepdims=True)
    on_nf = rng.random((n, FEATURES)) < ACTIVE / FEATURES
    x_nd = (on_nf * rng.uniform(0.5, 1.5, (n, FEATURES))) @ features_fd
    x_nd += 0.02 * rng.normal(size=x_nd.shape) + 3 * rng.normal(size=WIDTH)
    return torch.from_numpy(x_nd).float(), torch.from_numpy(features_fd).float()


def recipe(arch: Arch, target: int = 3, **fields: object) -> Recipe:
    """A short recipe for the synthetic activations."""
    sparsity = {"l0": float(target)} if arch in PENALISED else {"k": target}
    values = {"d_sae": 64, "steps": 600, "batch_rows": 256, "lr": 4e-3, "dead_after": 8000}
    return Recipe(arch=arch, **{**sparsity, **values, **fields})  # type: ignore[arg-type]


def stream(x_nd: Tensor, batch_rows: int = 256, memory: int = 2**30) -> Stream:
    return Stream(Rows(x_nd), batch_rows, memory=memory)


def train_on(x_nd: Tensor, recipes: Sequence[Recipe]) -> list[tuple[Fitted, Measured]]:
    """Train, and measure on the same rows."""
    rows = stream(x_nd, recipes[0].batch_rows)
    return [(one, measure(one.sae, rows, CPU)) for one in fit(recipes, rows, device=CPU)]


def pca_fvu(x_nd: Tensor, k: int) -> float:
    """Closed form: the share of the variance outside the first k principal components."""
    centred = x_nd.double().numpy()
    centred = centred - centred.mean(0)
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    return float(values[k:].sum() / values.sum())


def matched_cosine(features_fd: Tensor, W_dec_sd: Tensor) -> float:
    """Mean cosine of features with latents under the best one-to-one matching."""
    from scipy.optimize import linear_sum_assignment

    cosine_fs = (features_fd @ W_dec_sd.T).numpy()
    f, s = linear_sum_assignment(-cosine_fs)
    return float(cosine_fs[f, s].mean())


def same(a: Fitted, b: Fitted) -> bool:
    """Bit for bit the same SAE."""
    return a.sae.tensors.keys() == b.sae.tensors.keys() and all(
        torch.equal(a.sae.tensors[name], b.sae.tensors[name]) for name in a.sae.tensors
    )


def close(a: float, b: float, relative: float) -> bool:
    return math.isclose(a, b, rel_tol=relative)
