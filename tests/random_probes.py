"""Probes of random weights on a small SAE, and the same features and logits in plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.probe.single import SingleLatents
from saebench.probe.tree import Tree
from saebench.probe_features import feature_of
from saebench.probing.probes import Fitted, Probes
from tests.measure import Fixed
from tests.test_saes import D, S, make, numbers

N, T, C = 90, 5, 8
KINDS = {"cls": slice(0, 1), "patches": slice(1, T)}
X = numbers(N, T, D, seed=11) + 0.5
SAE = make("relu")
CODES = SAE.encode(X.flatten(0, 1))
CODER: Any = Fixed(X.flatten(0, 1), SAE.decode(CODES), CODES.dense())  # the same in any batch
LABELS = np.random.default_rng(3).integers(0, C - 1, N)  # the last class has no images
GENUS = np.array([0, 0, 1, 1, 2, 2, 2, 3])
IDS = [f"image{i}" for i in range(N)]


def fitted(d: int, seed: int, latents_k: list[int] | None = None, **more: Any) -> Fitted:
    """A probe of d columns, with the columns of its rows."""
    W_dc, b_c = numbers(d, C, seed=seed).double(), numbers(C, seed=seed + 1).double()
    latents = None if latents_k is None else torch.tensor(latents_k)
    columns = {"solver": "logistic", "penalty": 10.0**-seed, "converged": True, "n_train": 70}
    return Fitted(W_dc / d**0.5, b_c, latents, columns, **more)


TREE = Tree(
    latent_m=torch.tensor([4, 9, -1, -1, -1]),
    threshold_m=torch.tensor([4.0, 2.0, 0, 0, 0]),
    left_m=torch.tensor([1, 3, 2, 3, 4]),
    right_m=torch.tensor([2, 4, 2, 3, 4]),
    class_m=torch.tensor([0, 0, 5, 1, 2]),
    depth=2,
)
SINGLE = SingleLatents(
    torch.tensor([3, 3, 5, -1, 7, 8, 0, 2]),
    torch.tensor([1.0, -0.5, 0.3, 0.0, 2.0, 0.2, 0.7, 0.1]).double(),
    torch.tensor([-1.0, -2.0, -1.5, -2.1, -2.2, -1.0, -0.2, -3.0]).double(),
    torch.full((C,), 0.12, dtype=torch.float64),
)


def probes(chosen: str = "mean", **more: Any) -> Probes:
    """Probes of every kind that there is."""
    feature = feature_of(chosen, KINDS, "it")
    n_parts = len(feature.code_parts)
    d, s = n_parts * D, n_parts * S
    given: dict[str, Any] = {
        "feature": feature,
        "label": "",
        "n_classes": C,
        "x": fitted(d, 1),
        "xhat": fitted(d, 2),
        "codes": {how: fitted(s, 3 + i) for i, how in enumerate(feature.poolings)},
        "sparse": {1: fitted(1, 5, [7]), 2: fitted(2, 6, [7, 1]), 5: fitted(5, 7, [7, 1, 0, 9, 4])},
        "tree": TREE,
        "single": SINGLE,
        "columns": {"feature": feature.name, "n_train": 70},
        "taxonomy": {"genus": GENUS},
    }
    return Probes(**{**given, **more})


def pooled(chosen: str, how: str) -> np.ndarray:
    """[N s] the codes of an image."""
    z_nts = CODER.z_ns.double().numpy().reshape(N, T, S)
    patches = z_nts[:, 1:].max(1) if how == "max" else z_nts[:, 1:].mean(1)
    parts = {"cls": [z_nts[:, 0]], "mean": [patches], "cls+mean": [z_nts[:, 0], patches]}
    return np.concatenate(parts[chosen], 1).astype(np.float32).astype(np.float64)


def features(chosen: str, x_btd: Tensor) -> np.ndarray:
    """[N f] of activations or reconstructions."""
    x = x_btd.double().numpy()
    parts = {"cls": [x[:, 0]], "mean": [x[:, 1:].mean(1)]}
    parts["cls+mean"] = [*parts["cls"], *parts["mean"]]
    return np.concatenate(parts[chosen], 1).astype(np.float32).astype(np.float64)


def logits_of(some: Probes, chosen: str) -> dict[str, np.ndarray]:
    """Slot -> [N c] of every linear probe."""

    def of(one: Fitted, x: np.ndarray) -> np.ndarray:
        if one.latents_k is not None:
            x = x[:, one.latents_k.numpy()]
        return x @ one.W_dc.numpy() + one.b_c.numpy()

    assert some.xhat is not None
    x, xhat = (features(chosen, acts) for acts in (X, CODER.xhat_nd.view(N, T, D)))
    usual = next(iter(some.codes))
    return {
        "x": of(some.x, x),
        "xhat_frozen": of(some.x, xhat),
        "xhat_refit": of(some.xhat, xhat),
        **{f"codes {how}": of(one, pooled(chosen, how)) for how, one in some.codes.items()},
        **{f"k{k}": of(one, pooled(chosen, usual)) for k, one in some.sparse.items()},
    }
