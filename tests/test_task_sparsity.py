"""The tasks `sparsity` and `dead_neurons` against hand-computed vectors and a NumPy twin."""

from __future__ import annotations

import pytest
import torch

from tests.measure import Fixed, measure

# Eight rows, six latents, two rows an image: the fact sheet's second test vector.
Z = torch.tensor(
    [
        [1, 0, 0, -2, 0, 0],
        [0, 3, 0, 0, 0.0005, 0],
        [0, 0, 0, 2, 0, 0],
        [2, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [4, 0, 0, 1, 0, 0],
        [1, 2, 0, -1, 0, 0],
    ]
)
X = torch.arange(1.0, 9.0)[:, None] * torch.tensor([[1.0, 0.5]])


def test_vector() -> None:
    coder = Fixed(X, X, Z)
    rows = measure("sparsity", X.view(4, 2, 2), coder, conventions=True, batch=3)
    values = {(m, v): row.value for (m, g, v), row in rows.items() if g == "all"}
    assert values["l0", ""] == 1.5
    assert values["l0_image", ""] == 2.5
    assert values["l1", ""] == pytest.approx(2.5000625, abs=1e-9)
    assert values["dense_fraction", ""] == values["dense_fraction", "tau=0.1"] == 4 / 6
    assert values["density", "quantile=1.0"] == 0.5
    assert values["density", "quantile=0.5"] == pytest.approx((0.125 + 0.375) / 2)
    assert values["almost_dead_fraction", ""] is None
    for project, l0 in {
        "prisma": 1.25,
        "saev": 1.5,
        "mlsae": 1.125,
        "kutsyk": 1.25,
        "overcomplete_print": 1.5,
        "overcomplete": 0.25,
        "msae": 0.75,
    }.items():
        assert values["l0", f"convention={project}"] == l0
    assert values["l1", "convention=saebench"] == pytest.approx(1.7500625, abs=1e-9)


def test_dead_vector() -> None:
    rows = measure("dead_neurons", X.view(4, 2, 2), Fixed(X, X, Z), conventions=True, batch=1)
    assert rows["dead_fraction", "all", ""].value == pytest.approx(1 / 3)
    assert rows["dead_fraction", "all", "convention=dictionary_learning"].value == 1 / 2
    assert rows["dead_fraction", "all", "convention=saev"].value == pytest.approx(1 / 3)
    # latent 4 fires on one image only
    assert rows["dead_fraction", "all", "convention=monoscore"].value == 1 / 2
