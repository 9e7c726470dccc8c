"""Scores of probes from what is kept of images: scikit-learn's, and a bootstrap in plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, recall_score, top_k_accuracy_score

from saebench.metrics import poisson_weights, probe_scores
from saebench.metrics.bootstrap import image_keys, weights_of
from saebench.metrics.probe_scores import Score, Value, What, evaluate, n_present, single_gain
from saebench.metrics.probing import Predictions, Said, levels_of, said, said_class

N, C, R = 400, 12, 40
RNG = np.random.default_rng(0)
LABELS = np.minimum(RNG.geometric(0.25, N) - 1, C - 2)  # a long tail; class 11 has no images
IDS = [f"image{i}" for i in range(N)]
KEYS = image_keys("test", IDS)
WEIGHTS = poisson_weights("test", IDS, R)
LOGITS = {
    "x": RNG.normal(size=(N, C)) + 2.5 * np.eye(C)[LABELS],
    "xhat": RNG.normal(size=(N, C)) + 1.5 * np.eye(C)[LABELS],
}
GENUS = np.array([7, 7, 3, 3, 3, 9, 9, 1, 7, 1, 0, 0])  # of each class
FAMILY = np.where(np.isin(GENUS, [7, 1]), 2, 0)
COLOUR = np.array([0, 1, 2] * 4)  # which no genus decides
WHATS: tuple[What, ...] = ("accuracy", "top5", "macro", "loss")
SCORES = [Score(w, s, than) for w in WHATS for s, than in [("x", ""), ("xhat", ""), ("xhat", "x")]]


def softmax(logits_nc: np.ndarray) -> np.ndarray:
    exp_nc = np.exp(logits_nc - logits_nc.max(1, keepdims=True))
    return exp_nc / exp_nc.sum(1, keepdims=True)


def added(*parts: np.ndarray, which: dict[str, np.ndarray] = LOGITS) -> Predictions:
    """Predictions of images in batches, one after the other."""
    found = Predictions()
    for at in parts or (np.arange(N),):
        labels_b = torch.from_numpy(LABELS[at])
        slots = {k: said(torch.from_numpy(v[at]), labels_b, {})[""] for k, v in which.items()}
        found.add(KEYS[at], LABELS[at], slots)
    return found


def hits(logits_nc: np.ndarray, k: int) -> np.ndarray:
    return (np.argsort(-logits_nc, axis=1)[:, :k] == LABELS[:, None]).any(axis=1).astype(float)


def plainly(what: str, logits_nc: np.ndarray, weight_n: np.ndarray) -> float:
    """The score of a sample in which each image is so many times."""
    drawn = np.repeat(np.arange(N), weight_n.astype(int))
    y = LABELS[drawn]
    if what == "loss":
        return float(-np.log(softmax(logits_nc)[drawn, y]).mean())
    right = hits(logits_nc, 5 if what == "top5" else 1)[drawn]
    if what == "macro":
        return float(np.mean([right[y == c].mean() for c in np.unique(y)]))
    return float(right.mean())


def test_values_are_those_of_scikit_learn() -> None:
    found = evaluate(added().state(), SCORES, R)
    for slot, logits_nc in LOGITS.items():
        guess = logits_nc.argmax(1)
        expected = {
            "accuracy": accuracy_score(LABELS, guess),
            "top5": top_k_accuracy_score(LABELS, logits_nc, k=5, labels=range(C)),
            "macro": recall_score(LABELS, guess, labels=np.unique(LABELS), average="macro"),
            "loss": log_loss(LABELS, softmax(logits_nc), labels=range(C)),
        }
        for what in WHATS:
            assert found[Score(what, slot)].value == pytest.approx(expected[what], abs=1e-12)
    for what in WHATS:
        difference = found[Score(what, "xhat")].value - found[Score(what, "x")].value
        assert found[Score(what, "xhat", "x")].value == pytest.approx(difference, abs=1e-12)
        assert difference != 0
    assert n_present(added().state()) == len(np.unique(LABELS)) < C


@pytest.mark.parametrize("block", [1024, 37])
def test_replicates_are_a_bootstrap_over_images(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """block: of few images, so that classes are larger than it, and share it."""
    monkeypatch.setattr(probe_scores, "BLOCK", block)
    found = evaluate(added().state(), SCORES, R)
    for what in WHATS:
        x_r, xhat_r = (
            [plainly(what, LOGITS[slot], WEIGHTS[:, r]) for r in range(R)] for slot in LOGITS
        )
        difference_r = np.subtract(xhat_r, x_r)
        for score, expected_r in (
            (Score(what, "x"), x_r),
            (Score(what, "xhat"), xhat_r),
            (Score(what, "xhat", "x"), difference_r),
        ):
            np.testing.assert_allclose(found[score].replicates, expected_r, rtol=0, atol=1e-12)


def test_nothing_depends_on_batches_and_segments() -> None:
    whole = evaluate(added().state(), SCORES, R)
    batches = np.split(np.arange(N), [1, 2, 90, 91, 300])
    merged = Predictions()
    for segment in (batches[:2], batches[2:3], batches[3:]):
        merged.merge(added(*segment).state())
    merged.merge(Predictions().state())  # of a segment none of whose images decodes
    for score, value in evaluate(merged.state(), SCORES, R).items():
        assert value.value == whole[score].value
        np.testing.assert_array_equal(value.replicates, whole[score].replicates)


def test_the_same_predictions_differ_by_exactly_nothing() -> None:
    same = {"x": LOGITS["x"], "xhat": LOGITS["x"].copy()}
    found = evaluate(added(which=same).state(), SCORES)
    for what in WHATS:
        assert found[Score(what, "xhat", "x")].value == 0
        assert not found[Score(what, "xhat", "x")].replicates.any()


def test_of_equal_logits_the_lowest_class_comes_first() -> None:
    labels_b = torch.tensor([0, 1, 2, 3])
    logits_bc = torch.tensor([[1.0, 1, 1, 1]] * 3 + [[0.0, 2, 0, 0]])
    one = said(logits_bc, labels_b, {})[""]
    assert one.rank_b.tolist() == [0, 1, 2, 3]
    assert one.loss_b is not None
    assert one.loss_b[:3].tolist() == pytest.approx([np.log(4)] * 3)


def test_a_certain_probe_has_no_loss_and_not_less() -> None:
    one = said(torch.tensor([[900.0, 0.0]]), torch.tensor([0]), {})[""]
    assert one.loss_b is not None
    assert str(float(one.loss_b)) == "0.0"


@pytest.mark.parametrize("scale", [1, 2000])
def test_probabilities_are_added_up_to_a_level(scale: float) -> None:
    """scale: at 2,000 the probabilities of most values are below the least float64."""
    logits_nc = scale * LOGITS["x"]
    levels = levels_of({"genus": GENUS, "family": FAMILY, "colour": COLOUR})
    assert [level.below for level in levels.values()] == ["", "genus", ""]
    found = said(torch.from_numpy(logits_nc), torch.from_numpy(LABELS), levels)
    largest = logits_nc.max(1, keepdims=True).astype(np.longdouble)
    exp_nc = np.exp(logits_nc.astype(np.longdouble) - largest)  # down to 1e-4932
    for name, value_c in {"genus": GENUS, "family": FAMILY, "colour": COLOUR}.items():
        values = np.unique(value_c)
        p_nv = np.stack([exp_nc[:, value == value_c].sum(1) for value in values], 1)
        p_nv /= exp_nc.sum(1, keepdims=True)
        own = value_c[LABELS]
        own_n = p_nv[np.arange(N), np.searchsorted(values, own)]
        used = own_n > 0
        assert used.mean() > 0.6
        loss_b = found[name].loss_b
        assert loss_b is not None
        assert bool(torch.isfinite(loss_b).all())
        expected_n = -np.log(own_n[used]).astype(np.float64)
        np.testing.assert_allclose(loss_b.numpy()[used], expected_n, rtol=1e-9, atol=1e-12)
        right = values[p_nv.argmax(1)] == own
        np.testing.assert_array_equal((found[name].rank_b < 1).numpy(), right)
        assert 0.3 < right.mean() < 1


def test_scores_have_ranks_alone() -> None:
    found = said(torch.tensor([[0.0, 3.0]]), torch.tensor([0]), {}, scores=True)
    assert found[""].loss_b is None
    assert found[""].rank_b.tolist() == [1]
    one = Predictions()
    one.add(KEYS[:1], LABELS[:1], found)
    assert set(one.state()) == {"keys", "labels", "rank/"}


def test_ranks_are_kept_in_a_byte_each() -> None:
    predictions = Predictions()
    ranks = torch.tensor([0, 4, 5, 254, 255, 256, 9999])
    predictions.add(np.arange(7, dtype=np.uint64), np.arange(7), {"x": Said(ranks)})
    kept = predictions.state()["rank/x"]
    assert kept.nbytes == 7
    assert kept.tolist() == [0, 4, 5, 254, 255, 255, 255]


def test_a_named_class_is_right_or_wrong() -> None:
    assert said_class(torch.tensor([2, 0]), torch.tensor([2, 3])).rank_b.tolist() == [0, 1]


def test_where_no_image_has_weight_a_replicate_is_undefined() -> None:
    one = Predictions()
    one.add(KEYS[:1], LABELS[:1], {"x": Said(torch.zeros(1), torch.ones(1, dtype=torch.float64))})
    found = evaluate(one.state(), [Score("accuracy", "x"), Score("macro", "x")])
    without = weights_of(KEYS[:1])[0] == 0
    assert 100 < without.sum() < 250  # 500/e
    for value in found.values():
        assert value.value == 1
        np.testing.assert_array_equal(np.isnan(value.replicates), without)


def test_mean_gain_of_single_latents() -> None:
    """One class has no images, and two a prevalence of which nothing can be told."""
    ce_nc, p_c = RNG.uniform(0, 1, (N, C)), RNG.uniform(0.05, 0.9, C)
    p_c[2], p_c[4] = 0, 1
    with np.errstate(divide="ignore"):
        known_nc = np.where(LABELS[:, None] == np.arange(C), -np.log(p_c), -np.log(1 - p_c))

    def plain(weight_n: np.ndarray) -> float:
        drawn = np.repeat(np.arange(N), weight_n.astype(int))
        there = np.setdiff1d(np.unique(LABELS[drawn]), [2, 4])
        return float((1 - ce_nc[drawn].sum(0)[there] / known_nc[drawn].sum(0)[there]).mean())

    gain, used = single_gain(added().state(), ce_nc.sum(0), ce_nc.T @ WEIGHTS, p_c)
    assert isinstance(gain, Value)
    assert used == len(np.unique(LABELS)) - 2
    assert gain.value == pytest.approx(plain(np.ones(N)), rel=1e-12)
    expected_r = [plain(WEIGHTS[:, r]) for r in range(R)]
    np.testing.assert_allclose(gain.replicates, expected_r, rtol=1e-10)
