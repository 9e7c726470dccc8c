"""The task `reconstruction` against hand-computed vectors, closed forms and a NumPy twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.activations import TopK
from saebench.controls import Identity, Mean, Zero
from saebench.metrics import poisson_weights
from saebench.saes import Sae
from tests.measure import Fixed, finished, measure, measured, task_class

# Four images of two tokens, d = 3: the columns of the fact sheet's first test vector.
X = torch.tensor(
    [[3, 0, -1], [0, 2, -2], [1, -2, 0], [2, 0, -4], [-1, 0, -3], [4, 2, 0], [1, 0, 1], [2, -2, -3]]
).double()
R = torch.tensor(
    [[1, 0, 0], [0, -1, 0], [0, 0, 1], [1, 1, 0], [0, 0, -1], [2, 0, 0], [0, 1, 0], [0, 0, -1]]
).double()
OFFSET = torch.tensor([10.0, -4.0, 0.0]).double()
MU = X.mean(0).expand_as(X)

COLUMNS = {
    "base": (X, X - R),
    "offset": (X + OFFSET, X - R + OFFSET),
    "mean": (X, MU),
    "mean+o": (X + OFFSET, MU + OFFSET),
    "0.9x": (X, 0.9 * X),
}
OURS = {
    "mse": (0.5, 0.5, 2.3333333, 2.3333333, 0.0383333),
    "mse_per_token": (1.5, 1.5, 7, 7, 0.115),
    "fvu": (3 / 14, 3 / 14, 1, 1, 0.0164286),
    "explained_variance": (0.7857143, 0.7857143, 0, 0, 0.9835714),
    "cosine": (0.9459262285, 0.9970591804, 0.5745625385, 0.9837599550, 1),
    "l2_ratio": (0.9288081635, 0.9667635102, 0.7504378923, 0.9974360580, 0.9),
    "relative_reconstruction_bias": (0.9333333, 0.9660315, 1, 1, 0.9),
}
# The value without its ε of overcomplete is that of kutsyk; ε = 1e-6 moves it by less than 1e-6.
PEERS = {
    ("fvu", "saev"): OURS["fvu"],
    ("explained_variance", "sae_lens"): OURS["explained_variance"],
    ("explained_variance", "saebench"): (1.4695652, 1.0005772, 3.1913043, 1.0026936, 1.0360000),
    ("explained_variance", "overcomplete"): (0.8695652, 0.9896907, 0.3913043, 0.9518900, 0.99),
    ("r2", "kutsyk"): (0.8695652, 0.9896907, 0.3913043, 0.9518900, 0.99),
    ("r2", "monoloss"): (0.7809343, 0.7809343, 0, 0, 0.9839394),
    ("nmse", "openai"): (0.1729779, 0.0092925, 0.9743566, 0.0470176, 0.01),
    ("nmse", "msae"): (0.1729779, 0.0092925, 0.9743566, 0.0470176, 0.01),
    ("nmse", "sparc"): (0.1729779, 0.0092925, 0.9743566, 0.0470176, 0.01),
    ("nmse", "monoloss"): (0.1729779, 0.0092925, 0.9743566, 0.0470176, 0.01),
    ("explained_variance", "hugofry"): tuple(
        1 - v for v in (0.1729779, 0.0092925, 0.9743566, 0.0470176, 0.01)
    ),
    ("fvu", "msae"): (0.2328297, 0.0065744, 1.4108001, 0.0303992, 0.01),
    ("explained_variance", "clipscope"): (0.6440591, 0.9894059, -1.0550309, 0.9476493, 0.9835577),
    ("fvu", "visaebench"): (0.1086957, 0.0102881, 0.6086957, 0.0576132, 0.01),
    ("explained_variance", "visaebench"): tuple(
        1 - v for v in (0.1086957, 0.0102881, 0.6086957, 0.0576132, 0.01)
    ),
    ("fvu", "visaebench_cross_domain"): (0.1086957, 0.0102881, 0.6086957, 0.0576132, 0.01),
    ("l2_loss", "dictionary_learning"): (1.1767767, 1.1767767, 2.5974622, 2.5974622, 0.3233830),
    ("avg_l2", "overcomplete"): (1.1767767, 1.1767767, 2.5974622, 2.5974622, 0.3233830),
    ("mse", "sae_lens"): OURS["mse_per_token"],
    ("mse_per_token", "saev"): OURS["mse_per_token"],
    ("mse_per_dim", "saev"): OURS["mse"],
    ("mse", "monoloss_batch_topk"): OURS["mse"],
    ("mse", "patchsae"): (0.1551877, 0.0390812, 0.7960290, 0.1897118, 0.0107794),
    ("mse", "hugofry"): (0.1551877, 0.0390812, 0.7960290, 0.1897118, 0.0107794),
}


def images(rows_nd: Tensor, tokens: int = 2) -> Tensor:
    return rows_nd.float().unflatten(0, (-1, tokens))


def fixed(x_nd: Tensor, xhat_nd: Tensor) -> Fixed:
    return Fixed(x_nd.float(), xhat_nd.float(), torch.ones(len(x_nd), 1))


@pytest.mark.parametrize("column", COLUMNS)
def test_vector(column: str) -> None:
    x_nd, xhat_nd = COLUMNS[column]
    at = list(COLUMNS).index(column)
    rows = measure("reconstruction", images(x_nd), fixed(x_nd, xhat_nd), conventions=True, batch=1)
    for metric, values in OURS.items():
        assert rows[metric, "all", ""].value == pytest.approx(values[at], abs=6e-8), metric
    for (metric, project), values in PEERS.items():
        found = rows[metric, "all", f"convention={project}"].value
        assert found == pytest.approx(values[at], abs=3e-7), (metric, project)
    reported = {(m, v.removeprefix("convention=")) for m, g, v in rows if v and g == "all"}
    assert reported == set(PEERS)


def topk_sae(d: int = 12, s: int = 40, k: int = 4, seed: int = 0) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    rows_sd = torch.nn.functional.normalize(torch.randn(s, d, generator=generator), dim=1)
    b_dec_d = torch.randn(d, generator=generator)
    return Sae(
        W_enc_ds=rows_sd.T.clone(),
        b_enc_s=torch.zeros(s),
        W_dec_sd=rows_sd,
        b_dec_d=b_dec_d,
        activation=TopK(k),
        architecture="topk",
        b_pre_d=b_dec_d,
    )


def activations(images: int = 30, tokens: int = 5, d: int = 12, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, tokens, d, generator=generator) + 0.5


KINDS = {"cls": slice(0, 1), "patches": slice(1, 5)}


def twin(x: np.ndarray, xhat: np.ndarray) -> dict[str, float]:
    """The formulas as they are written, in float64."""
    r, centred = x - xhat, x - x.mean(0)
    norm, norm_hat = np.linalg.norm(x, axis=1), np.linalg.norm(xhat, axis=1)
    fvu = (r**2).sum() / (centred**2).sum()
    return {
        "mse": (r**2).mean(),
        "mse_per_token": (r**2).sum(1).mean(),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "cosine": ((x * xhat).sum(1) / norm / norm_hat).mean(),
        "l2_ratio": (norm_hat / norm).mean(),
        "relative_reconstruction_bias": (xhat**2).sum() / (x * xhat).sum(),
    }


@pytest.mark.parametrize("group", ["all", "cls", "patches"])
def test_equals_a_numpy_twin_for_every_token_kind(group: str) -> None:
    x_btd, sae = activations(), topk_sae()
    xhat_btd = sae.decode(sae.encode(x_btd.flatten(0, 1))).view_as(x_btd)
    part = KINDS.get(group, slice(None))
    expected = twin(
        x_btd[:, part].flatten(0, 1).double().numpy(),
        xhat_btd[:, part].flatten(0, 1).double().numpy(),
    )
    rows = measure("reconstruction", x_btd, sae, kinds=KINDS)
    for metric, value in expected.items():
        assert rows[metric, group, ""].value == pytest.approx(value, rel=1e-12), metric
        assert rows[metric, group, ""].n == x_btd[:, part].shape[:2].numel()


def test_replicates_are_the_statistic_of_the_resampled_images() -> None:
    x_btd, sae = activations(), topk_sae()
    xhat_btd = sae.decode(sae.encode(x_btd.flatten(0, 1))).view_as(x_btd)
    rows = measure("reconstruction", x_btd, sae, batch=7)
    weights_br = poisson_weights("test", [f"image{i}" for i in range(len(x_btd))])
    for replicate in (0, 17, 499):
        drawn = np.repeat(np.arange(len(x_btd)), weights_br[:, replicate].astype(int))
        expected = twin(
            x_btd[drawn].flatten(0, 1).double().numpy(),
            xhat_btd[drawn].flatten(0, 1).double().numpy(),
        )
        for metric, value in expected.items():
            found = rows[metric, "all", ""].replicates
            assert found is not None
            assert found[replicate] == pytest.approx(value, rel=1e-10), metric


def value(metric: str, x_btd: Tensor, coder: Sae | Fixed, **how: object) -> float:
    found = measure("reconstruction", x_btd, coder, **how)[metric, "all", ""].value
    assert found is not None
    return found


@pytest.mark.parametrize("metric", ["fvu", "explained_variance"])
def test_fvu_does_not_change_by_translation_scaling_or_rotation(metric: str) -> None:
    x_nd = activations(20, 2, 6).flatten(0, 1).double()
    xhat_nd = x_nd + 0.3 * activations(20, 2, 6, seed=3).flatten(0, 1).double()
    # Powers of two and small integers, so that float32 holds the moved vectors exactly.
    x_nd, xhat_nd = (v.mul(256).round() / 256 for v in (x_nd, xhat_nd))
    base = value(metric, images(x_nd), fixed(x_nd, xhat_nd))
    rotation = torch.eye(6).roll(1, 0).double() * torch.tensor([1, -1, 1, 1, -1, 1])
    moves = {
        "translated": lambda v: v + torch.arange(6) * 4,
        "scaled": lambda v: v * 8,
        "rotated": lambda v: v @ rotation,
    }
    for name, move in moves.items():
        moved = value(metric, images(move(x_nd)), fixed(move(x_nd), move(xhat_nd)))
        assert moved == pytest.approx(base, rel=1e-12), name
    shifted = value("cosine", images(x_nd + 32), fixed(x_nd + 32, xhat_nd + 32))
    assert shifted != pytest.approx(value("cosine", images(x_nd), fixed(x_nd, xhat_nd)), rel=1e-3)


@pytest.mark.parametrize("offset", [16.0, 512.0])
def test_a_large_common_mean_in_data_and_bias_leaves_fvu(offset: float) -> None:
    x_btd = (activations() * 1024).round() / 1024  # float32 holds x + offset to 2^-14 or better
    sae = topk_sae()
    sae.b_dec_d.mul_(1024).round_().div_(1024)
    base = value("fvu", x_btd, sae)
    moved = topk_sae()
    moved.b_dec_d.copy_(sae.b_dec_d + offset)
    for shift in (None, (x_btd + offset).mean((0, 1)).double().numpy()):
        found = value("fvu", x_btd + offset, moved, shift_d=shift)
        assert found == pytest.approx(base, rel=1e-4 if offset > 100 else 3e-6)


@pytest.mark.parametrize("batch", [1, 4, 7, 30])
def test_any_partition_gives_the_same_numbers(batch: int) -> None:
    """Contract (a): from the same activations and codes, 1e-12 relative."""
    x_btd = activations() + 100
    x_nd = x_btd.flatten(0, 1)
    sae = topk_sae()
    coder = fixed(x_nd, sae.decode(sae.encode(x_nd)))
    how = {"kinds": KINDS, "conventions": True, "shift_d": np.full(12, 99.0)}
    whole = measure("reconstruction", x_btd, coder, **how)
    parts = measure("reconstruction", x_btd, coder, batch=batch, **how)
    for key, row in whole.items():
        if row.value is None:
            assert parts[key].value is None
        else:
            assert parts[key].value == pytest.approx(row.value, rel=1e-12), key
        if row.replicates is not None:
            replicates = parts[key].replicates
            assert replicates is not None
            np.testing.assert_allclose(replicates, row.replicates, rtol=1e-11)


def test_segments_fold_to_the_same_bits() -> None:
    """Contract (b): the fold of segments is the same fold, whoever computed them."""
    x_btd, sae = activations(), topk_sae()
    one = finished("reconstruction", x_btd, sae, batch=5, segments=[10, 20], kinds=KINDS)
    other = finished("reconstruction", x_btd, sae, batch=5, segments=[10, 20], kinds=KINDS)
    for name, array in one.state().items():
        np.testing.assert_array_equal(array, other.state()[name])
    fresh = finished("reconstruction", x_btd[:0], sae, kinds=KINDS, shift_d=None)
    fresh.merge(one.state())
    assert {k: r.value for k, r in measured(fresh).items()} == {
        k: r.value for k, r in measured(one).items()
    }


def test_batch_sizes_agree_to_rounding_of_the_product() -> None:
    """Contract (c): 1e-6 relative on sums."""
    x_btd, sae = activations(), topk_sae()
    whole = measure("reconstruction", x_btd, sae)
    parts = measure("reconstruction", x_btd, sae, batch=3)
    for key, row in whole.items():
        assert parts[key].value == pytest.approx(row.value, rel=1e-6), key


def test_undefined_is_none_with_a_note() -> None:
    constant = torch.full((4, 2, 3), 0.1)
    rows = measure("reconstruction", constant, Zero(3), conventions=True, shift_d=None)
    assert rows["fvu", "all", ""].value is None
    assert "no variance" in rows["fvu", "all", ""].note
    assert rows["mse", "all", ""].value == pytest.approx(0.01)
    zero = measure("reconstruction", torch.zeros(4, 2, 3), Identity(3), conventions=True)
    for row in zero.values():
        assert row.value is None or np.isfinite(row.value)
        assert (row.value is None) == bool(row.note)


def test_rows_of_norm_zero_are_left_out_and_counted() -> None:
    x_btd = activations(4, 5)
    x_btd[1, 2] = 0
    row = measure("reconstruction", x_btd, Identity(12))["cosine", "all", ""]
    assert (row.value, row.n) == (pytest.approx(1), 19)
    assert row.note == "1 rows of norm 0 are left out"


def test_all_metrics_are_declared_and_within_bounds() -> None:
    declared = {m.name: m for m in task_class("reconstruction").metrics}
    for coder in (topk_sae(), Zero(12), Identity(12), Mean(torch.zeros(5, 12))):
        for (metric, _, variant), row in measure(
            "reconstruction", activations(), coder, conventions=True
        ).items():
            low, high = declared[metric].bounds
            if row.value is not None and not variant:
                assert low is None or row.value >= low
                assert high is None or row.value <= high
