"""What codes say of classes latent by latent: ranking, tree and single latents, by scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from saebench.codes import Codes
from saebench.probe import ranking, single, tree
from saebench.probe.one_latent import RIDGE
from saebench.probe.ranking import rank_latents
from saebench.probe.single import SingleLatents, fit_single
from saebench.probe.tree import Tree, fit_tree

N, D, C = 400, 30, 6
SILENT, PERFECT, NEGATIVE = 5, 3, 6
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def parts(z: np.ndarray) -> Parts:
    found = Codes.from_dense(torch.from_numpy(z))
    return found.offsets_n1, found.indices_m, found.values_m


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """Of the last class there are none."""
    return np.random.default_rng(0).integers(0, C - 1, N)


@pytest.fixture(scope="module")
def z(labels: np.ndarray) -> np.ndarray:
    """[N D]: latents that tell of classes, one that is one, a silent one, one below 0."""
    rng = np.random.default_rng(1)
    likely_cd = rng.normal(size=(C, D))
    found = np.maximum(rng.normal(size=(N, D)) - 1 + likely_cd[labels], 0)
    found[:, PERFECT] = (labels == 2) * 1.5
    found[:, SILENT], found[:, NEGATIVE], found[7] = 0, -found[:, NEGATIVE], 0
    return found.astype(np.float32)


def ranked(z: np.ndarray, labels: np.ndarray, c: int = C) -> torch.Tensor:
    return rank_latents(*parts(z), z.shape[1], torch.from_numpy(labels), c)


# Ranking


@pytest.mark.filterwarnings("ignore:Features|divide|invalid")
def test_the_order_is_that_of_the_f_of_scikit_learn(z: np.ndarray, labels: np.ndarray) -> None:
    f_d, _ = f_classif(z.astype(np.float64), labels)
    found = ranked(z, labels).numpy()
    assert sorted(found) == list(range(D))
    assert found[-1] == SILENT
    assert (np.diff(f_d[found[:-1]]) <= 0).all()
    assert (f_d[found[:3]] > f_d[found[-4]]).all()


def test_blocks_change_no_order(
    z: np.ndarray, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ranked(z, labels)
    monkeypatch.setattr(ranking, "_TABLE", 2 * D)
    monkeypatch.setattr(ranking, "_BLOCK", 17)
    assert torch.equal(ranked(z, labels), whole)


def test_equals_are_in_order_and_constant_latents_last() -> None:
    labels = np.array([0, 0, 1, 1])
    z = np.array([[3, 0, 1, 0, 1, 0], [3, 0, 1, 0, 1, 0], [3, 0, 0, 2, 0, 0], [3, 0, 0, 2, 0, 1]])
    assert ranked(z.astype(np.float32), labels, 2).tolist() == [2, 3, 4, 5, 0, 1]


def test_what_is_equal_but_for_rounding_is_in_order() -> None:
    """200 latents, each firing on one image of one class, with a value of its own."""
    rng = np.random.default_rng(4)
    y, z = np.arange(1000) % 4, np.zeros((1000, 200), np.float32)
    z[rng.permutation(np.flatnonzero(y == 2))[:200], np.arange(200)] = rng.gamma(1, size=200) + 0.1
    assert ranked(z, y, 4).tolist() == list(range(200))
    found = fit_single(*parts(z), 200, torch.from_numpy(y), 4)
    assert int(found.latent_c[2]) == 0
    tried = single._candidates(*parts(z), 200, torch.from_numpy(y), np.bincount(y))
    assert tried[1].reshape(4, -1).tolist() == [list(range(single.CANDIDATES))] * 4


def test_a_constant_that_float32_rounds_is_constant(labels: np.ndarray) -> None:
    z = np.full((N, 2), 0.1, np.float32)
    z[:, 1] += np.random.default_rng(0).normal(size=N).astype(np.float32) * 1e-3
    assert ranked(z, labels).tolist() == [1, 0]


def test_of_one_class_all_are_equal() -> None:
    z = np.random.default_rng(0).random((20, 4), np.float32)
    assert sorted(ranked(z, np.zeros(20, np.int64), 1).tolist()) == [0, 1, 2, 3]


# Tree


def test_a_tree_predicts_as_scikit_learn_does_on_every_row(
    z: np.ndarray, labels: np.ndarray
) -> None:
    order = ranked(z, labels)
    found = fit_tree(*parts(z), D, torch.from_numpy(labels), C, order, seed=3)
    theirs = DecisionTreeClassifier(max_depth=tree.DEPTH, random_state=3).fit(z, labels)
    others = np.random.default_rng(5).permuted(z, axis=0)
    assert 20 < len(found.latent_m) == theirs.tree_.node_count
    for rows in (z, others, z[:0], np.zeros_like(z[:3])):
        expected = theirs.predict(rows) if len(rows) else []
        assert found.predict(*parts(rows)).tolist() == list(expected)


def test_thresholds_that_are_codes_are_compared_as_by_scikit_learn() -> None:
    """Neighbouring float32 numbers: halfway between them is one of the two."""
    below = np.float32(2.1)
    above = np.nextafter(below, np.float32(3))
    z = np.array([[below], [above]] * 3 + [[-below], [-above]], np.float32)
    labels = np.array([0, 1] * 3 + [1, 0])
    found = fit_tree(*parts(z), 1, torch.from_numpy(labels), 2, torch.tensor([0]), seed=0)
    theirs = DecisionTreeClassifier(random_state=0).fit(z, labels)
    assert found.predict(*parts(z)).tolist() == theirs.predict(z).tolist() == labels.tolist()


def test_a_tree_sees_the_latents_given_alone(z: np.ndarray, labels: np.ndarray) -> None:
    given = torch.tensor([20, 4, 9])
    found = fit_tree(*parts(z), D, torch.from_numpy(labels), C, given, seed=0)
    theirs = DecisionTreeClassifier(max_depth=tree.DEPTH, random_state=0)
    theirs.fit(z[:, [4, 9, 20]], labels)
    assert set(found.latent_m.tolist()) == {-1, 4, 9, 20}
    assert found.predict(*parts(z)).tolist() == theirs.predict(z[:, [4, 9, 20]]).tolist()


def test_a_tree_is_bounded(
    z: np.ndarray, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "LATENTS", 2)
    monkeypatch.setattr(tree, "DEPTH", 3)
    monkeypatch.setattr(tree, "ROWS", 100)
    order = ranked(z, labels)
    y_n = torch.from_numpy(labels)
    found = fit_tree(*parts(z), D, y_n, C, order, seed=0)
    assert set(found.latent_m.tolist()) <= {-1, *order[:2].tolist()}
    assert found.depth <= 3
    again, other = (fit_tree(*parts(z), D, y_n, C, order, seed=seed) for seed in (0, 1))
    assert torch.equal(again.threshold_m, found.threshold_m)
    assert not torch.equal(other.threshold_m, found.threshold_m)  # other rows are drawn


def test_a_tree_comes_back_from_its_arrays(
    z: np.ndarray, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fit_tree(*parts(z), D, torch.from_numpy(labels), C, ranked(z, labels), seed=0)
    back = Tree.of({name: array.copy() for name, array in found.arrays().items()})
    expected = found.predict(*parts(z))
    monkeypatch.setattr(tree, "_BLOCK", 100)
    assert torch.equal(back.predict(*parts(z)), expected)


def test_without_latents_a_tree_is_the_most_frequent_class() -> None:
    y_n = torch.tensor([2, 1, 1, 2, 0])
    nothing = parts(np.zeros((5, 0), np.float32))
    found = fit_tree(*nothing, 0, y_n, 3, torch.zeros(0, dtype=torch.int64), seed=0)
    assert found.predict(*nothing).tolist() == [1] * 5
    z = np.random.default_rng(0).random((5, 3), np.float32)
    alone = fit_tree(*parts(z), 3, torch.full((5,), 4), 6, torch.arange(3), seed=0)
    assert alone.predict(*parts(z)).tolist() == [4] * 5


# Single latents


def losses(found: SingleLatents, z: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """[n c]: the CE of each image and class by its latent, and by the prevalence."""
    is_nc = labels[:, None] == np.arange(len(found.latent_c))
    latent_c = found.latent_c.numpy()
    z_nc = np.where(latent_c >= 0, z[:, latent_c].astype(np.float64), 0)
    u_nc = found.slope_c.numpy() * z_nc + found.bias_c.numpy()
    p_c = found.prevalence_c.numpy()
    constant_nc = -np.where(is_nc, np.log(p_c), np.log1p(-p_c))
    return np.logaddexp(0, np.where(is_nc, -u_nc, u_nc)), constant_nc


def test_single_latents_are_the_best_of_all_by_scikit_learn(
    z: np.ndarray, labels: np.ndarray
) -> None:
    found = fit_single(*parts(z), D, torch.from_numpy(labels), C)
    for label in range(C - 1):
        least, best, slope, bias = np.inf, -1, 0.0, 0.0
        for j in set(range(D)) - {SILENT}:
            x = z[:, [j]].astype(np.float64)
            deviation = x.std()
            model: Any = LogisticRegression(C=1 / (RIDGE * N), tol=1e-10, max_iter=1000)
            p = model.fit(x / deviation, labels == label).predict_proba(x / deviation)[:, 1]
            ce = -np.log(np.where(labels == label, p, 1 - p)).mean()
            if ce < least:
                least, best = ce, j
                slope, bias = model.coef_[0, 0] / deviation, model.intercept_[0]
        assert int(found.latent_c[label]) == best
        assert float(found.slope_c[label]) == pytest.approx(slope, rel=1e-3)
        assert float(found.bias_c[label]) == pytest.approx(bias, rel=1e-3)
    assert int(found.latent_c[2]) == PERFECT
    by_latent_nc, constant_nc = losses(found, z, labels)
    assert by_latent_nc.mean(0)[2] < 1e-4
    assert (by_latent_nc.mean(0)[:-1] < constant_nc.mean(0)[:-1]).all()


def test_a_class_without_rows_gains_nothing(z: np.ndarray, labels: np.ndarray) -> None:
    found = fit_single(*parts(z), D, torch.from_numpy(labels), C)
    assert int(found.latent_c[-1]) == -1
    assert float(found.prevalence_c[-1]) == pytest.approx(0.5 / N)
    everyone = torch.full((N, 0), 0.0)
    sums = found.sums(*parts(z), torch.full((N,), C - 1), everyone)
    assert float(sums.latent_c[-1]) == pytest.approx(float(sums.prevalence_c[-1]), rel=1e-12)
    assert float(sums.latent_c[-1]) == pytest.approx(N * np.log(2 * N), rel=1e-9)


@pytest.mark.parametrize(("block", "dense"), [(50, 1.0), (2**21, 0.0)])
def test_sums_are_those_of_the_dense_formula(
    z: np.ndarray, labels: np.ndarray, block: int, dense: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "_BLOCK", block)
    monkeypatch.setattr(single, "DENSE", dense)
    found = fit_single(*parts(z), D, torch.from_numpy(labels), C)
    found.latent_c[4] = found.latent_c[0]  # one latent of two classes
    rng = np.random.default_rng(2)
    others, truth = rng.permuted(z, axis=0)[:150], rng.integers(0, C, 150)
    weights = rng.multinomial(150, np.full(150, 1 / 150), 9).T
    sums = found.sums(*parts(others), torch.from_numpy(truth), torch.from_numpy(weights))
    for own, total_c, total_cr in zip(
        losses(found, others, truth),
        (sums.latent_c, sums.prevalence_c),
        (sums.latent_cr, sums.prevalence_cr),
        strict=True,
    ):
        np.testing.assert_allclose(total_c.numpy(), own.sum(0), rtol=1e-10)
        np.testing.assert_allclose(total_cr.numpy(), own.T @ weights, rtol=1e-10)


def test_single_latents_come_back_from_their_arrays(z: np.ndarray, labels: np.ndarray) -> None:
    found = fit_single(*parts(z), D, torch.from_numpy(labels), C)
    back = SingleLatents.of(found.arrays())
    assert all(np.array_equal(back.arrays()[k], v) for k, v in found.arrays().items())
    assert set(found.arrays()) == {"latent_c", "slope_c", "bias_c", "prevalence_c"}


@pytest.mark.parametrize("d", [0, 3])
@pytest.mark.parametrize("label", [0, 1])
def test_single_latents_of_nothing_are_the_prevalence(d: int, label: int) -> None:
    """No latents, silent ones, one class alone: nothing to gain, and nothing infinite."""
    z = np.zeros((10, d), np.float32)
    y_n = torch.full((10,), label)
    found = fit_single(*parts(z), d, y_n, 2)
    assert found.latent_c.tolist() == [-1, -1]
    sums = found.sums(*parts(z), y_n, torch.ones(10, 2))
    assert torch.equal(sums.latent_c, sums.prevalence_c)
    assert torch.equal(sums.latent_cr, sums.prevalence_cr)
    expected = 10 * -np.log(0.95)
    assert sums.latent_cr.numpy() == pytest.approx(np.full((2, 2), expected))


@pytest.mark.parametrize("share", [0.001, 0.5])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_hard_fits_end_at_the_optimum(share: float, offset: float) -> None:
    """Rare classes, codes far from 0, and ones that nearly separate: no descent is left."""
    rng = np.random.default_rng(3)
    labels = (rng.random(5000) < share).astype(np.int64)
    labels[:2] = 1, 0
    z = (labels[:, None] * 4 + rng.normal(size=(5000, 2)) + offset).astype(np.float32)
    found = fit_single(*parts(z), 2, torch.from_numpy(labels), 2)
    latent = int(found.latent_c[1])
    x = z[:, latent].astype(np.float64)
    x_n = (x - x.mean()) / x.std()
    model = LogisticRegression(C=1 / (RIDGE * 5000), tol=1e-12, max_iter=1000)
    p = model.fit(x_n[:, None], labels).predict_proba(x_n[:, None])[:, 1]
    least = -np.log(np.where(labels == 1, p, 1 - p)).mean()
    by_latent_nc, _ = losses(found, z, labels)
    assert by_latent_nc[:, 1].mean() == pytest.approx(least, rel=1e-5)
