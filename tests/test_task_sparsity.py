"""The tasks `sparsity` and `dead_neurons` against hand-computed vectors and a NumPy twin."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from saebench.activations import Threshold
from saebench.controls import Identity
from saebench.metrics import latents, poisson_weights
from tests.measure import Fixed, finished, measure, measured
from tests.test_saes import D, make, numbers

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


KINDS = {"cls": slice(0, 1), "patches": slice(1, 4)}
D_SAE = 11


def random_codes(images: int = 60, tokens: int = 4, seed: int = 0) -> tuple[torch.Tensor, Fixed]:
    """Activations that name their row, and codes with ties, signs, a dead and a dense latent."""
    generator = torch.Generator().manual_seed(seed)
    n = images * tokens
    z_ns = torch.randn(n, D_SAE, generator=generator)
    z_ns = torch.where(z_ns > 1, (z_ns * 4).round() / 4, 0.0)  # quarters: equal values are common
    z_ns[:, 0] = 0
    z_ns[:, 1] = -torch.rand(n, generator=generator)
    z_ns[:-1, 2] = 0
    z_ns[-1, 2] = 0.125
    x_nd = torch.stack([torch.arange(1.0, n + 1), torch.ones(n)], dim=1)
    return x_nd.view(images, tokens, 2), Fixed(x_nd, x_nd, z_ns)


@pytest.mark.parametrize("batch", [1, 7, 60])
@pytest.mark.parametrize("group", ["all", "cls", "patches"])
def test_equals_a_numpy_twin(group: str, batch: int) -> None:
    x_btd, coder = random_codes()
    z = coder.z_ns.double().numpy().reshape(60, 4, D_SAE)[:, KINDS.get(group, slice(None))]
    rows = measure("sparsity", x_btd, coder, kinds=KINDS, batch=batch)
    p = (z != 0).mean((0, 1))
    expected = {
        ("l0", ""): (z != 0).sum(2).mean(),
        ("l0_image", ""): (z != 0).any(1).sum(1).mean(),
        ("l1", ""): np.abs(z).sum(2).mean(),
        ("l1_scaled", ""): np.abs(z).sum(2).mean(),
        ("dense_fraction", ""): (p > 0.01).mean(),
        ("dense_fraction", "tau=0.1"): (p > 0.1).mean(),
        **{
            ("density", f"quantile={q}"): np.quantile(p, q)
            for q in (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
        },
    }
    for (metric, variant), value in expected.items():
        assert rows[metric, group, variant].value == pytest.approx(value, rel=1e-12), metric
    weights_br = poisson_weights("test", [f"image{i}" for i in range(60)])
    drawn = np.repeat(np.arange(60), weights_br[:, 11].astype(int))
    for metric, value in {
        "l0": (z[drawn] != 0).sum(2).mean(),
        "l0_image": (z[drawn] != 0).any(1).sum(1).mean(),
    }.items():
        replicates = rows[metric, group, ""].replicates
        assert replicates is not None
        assert replicates[11] == pytest.approx(value, rel=1e-12)


def test_l1_scaled_does_not_depend_on_how_code_and_decoder_share_the_scale() -> None:
    x_btd = numbers(10, 3, D, seed=9)
    sae = make("jumprelu", pre_bias=True)
    rho = torch.linspace(0.5, 4, sae.d_sae)
    assert isinstance(sae.activation, Threshold)
    folded = replace(
        sae,
        W_enc_ds=sae.W_enc_ds * rho,
        b_enc_s=sae.b_enc_s * rho,
        W_dec_sd=sae.W_dec_sd / rho[:, None],
        activation=Threshold(sae.activation.theta * rho),
    )
    one, other = (measure("sparsity", x_btd, s) for s in (sae, folded))
    assert one["l1", "all", ""].value != pytest.approx(other["l1", "all", ""].value, rel=1e-2)
    for metric in ("l0", "l1_scaled"):
        value = other[metric, "all", ""].value
        assert one[metric, "all", ""].value == pytest.approx(value, rel=1e-6)


def top_twin(z_bt: np.ndarray) -> list[tuple[int, int, float]]:
    """(image, token, value) of the sixteen largest images; among equals the earlier one."""
    found = []
    for image, z_t in enumerate(z_bt):
        fired = np.flatnonzero(z_t)
        if fired.size:
            token = fired[z_t[fired].argmax()]
            found.append((-z_t[token], image, int(token)))
    return [(image, token, -value) for value, image, token in sorted(found)[:16]]


@pytest.mark.parametrize(
    ("batch", "segments"), [(60, []), (1, []), (7, [21, 40]), (60, [1, 2, 59])]
)
def test_latents_table(batch: int, segments: list[int]) -> None:
    x_btd, coder = random_codes()
    labels = np.arange(60) % 3
    table = finished(
        "sparsity",
        x_btd,
        coder,
        kinds=KINDS,
        batch=batch,
        segments=segments,
        labels=labels,
        class_names=["a", "b", "c"],
    ).latents()
    assert table is not None
    z = coder.z_ns.numpy().reshape(60, 4, D_SAE)
    row = 0
    for kind, part in KINDS.items():
        for latent in range(D_SAE):
            z_bt = z[:, :, latent].copy()
            z_bt[:, : part.start] = 0
            z_bt[:, part.stop :] = 0
            active = z_bt[z_bt != 0].astype(np.float64)
            at = {name: column[row] for name, column in table.items()}
            assert (at["group"], at["latent"]) == (kind, latent)
            assert at["n_active"] == active.size
            assert at["density"] == active.size / (60 * (part.stop - part.start))
            assert at["n_images_active"] == (z_bt != 0).any(1).sum()
            expected = top_twin(z_bt)
            images = at["top_images"].compressed().tolist()
            tokens = at["top_tokens"].compressed().tolist()
            values = at["top_values"].compressed().tolist()
            assert list(zip(images, tokens, values, strict=True)) == expected
            if active.size:
                assert at["max"] == active.max()
                assert at["mean_active"] == pytest.approx(active.mean(), rel=1e-12)
                assert at["first_row"] == np.flatnonzero(z_bt.ravel())[0]
                classes = Counter(labels[image] for image, _, _ in expected)
                best = max(classes.values())
                assert at["best_class"] == next(
                    labels[i] for i, _, _ in expected if classes[labels[i]] == best
                )
                assert at["purity"] == best / len(expected)
            else:
                for name in ("max", "mean_active", "first_row", "best_class", "purity"):
                    assert at[name] is np.ma.masked
            row += 1
    assert row == len(table["latent"])


def test_few_images_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x_btd, coder = random_codes()
    whole = finished("sparsity", x_btd, coder, kinds=KINDS)
    monkeypatch.setattr(latents, "TABLE_CELLS", 7 * 2 * D_SAE)
    parts = finished("sparsity", x_btd, coder, kinds=KINDS)
    for name, array in whole.state().items():
        np.testing.assert_allclose(parts.state()[name], array, rtol=1e-12)


@pytest.mark.parametrize(("batch", "segments"), [(60, []), (1, []), (7, [21, 40])])
@pytest.mark.parametrize("group", ["all", "cls", "patches"])
def test_dead_fraction_at_budgets(group: str, batch: int, segments: list[int]) -> None:
    x_btd, coder = random_codes(images=600)
    z = coder.z_ns.numpy().reshape(600, 4, D_SAE)[:, KINDS.get(group, slice(None))]
    fired = z.reshape(-1, D_SAE) != 0
    task = finished("dead_neurons", x_btd, coder, kinds=KINDS, batch=batch, segments=segments)
    rows = measured(task)
    assert rows["dead_fraction", group, ""].value == (~fired.any(0)).mean()
    assert rows["dead_fraction", group, ""].n == len(fired)
    budgets = [b for b in (1000, 10_000) if b <= len(fired)]
    for budget in budgets:
        row = rows["dead_fraction", group, f"budget={budget}"]
        assert row.value == (~fired[:budget].any(0)).mean()
        assert row.n == budget
    assert sum(v.startswith("budget") for m, g, v in rows if g == group) == len(budgets)


@pytest.mark.parametrize(
    ("n", "bound"), [(100, 0.0295130), (1000, 0.00299125), (50_000, 5.991285e-5)]
)
def test_bound_of_a_latent_that_never_fired(n: int, bound: float) -> None:
    x_btd = torch.arange(1.0, n + 1).view(n // 2, 2, 1)
    rows = measure("dead_neurons", x_btd, Identity(1))
    assert rows["dead_rate_upper95", "all", ""].value == pytest.approx(bound, rel=1e-5)
    images = rows["dead_rate_upper95", "all", "basis=images"]
    assert images.n == n // 2
    assert images.value == pytest.approx(1 - 0.05 ** (2 / n), rel=1e-9)
