"""The probe's solver, held to scikit-learn's LogisticRegression at its optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from saebench import probe
from saebench.probe import PENALTIES, Rows, fit_probe, scores, solve

C = 12


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x).float(), torch.from_numpy(y).long()


@pytest.fixture(scope="module")
def anisotropic() -> tuple[Tensor, Tensor]:
    """[600 24] with a large common mean and variances over four decades; C classes that overlap."""
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(600) % C)
    centre = rng.normal(size=(C, 24))
    x = (centre[y] + rng.normal(size=(600, 24))) * np.logspace(0, -2, 24)
    x = x @ np.linalg.qr(rng.normal(size=(24, 24)))[0] + 30
    return torch.from_numpy(x).float(), torch.from_numpy(y).long()


def least(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
    """The least of the objective on scaled rows by scikit-learn, and its logits [n c]."""
    model = LogisticRegression(C=1 / (penalty * len(y)), tol=1e-9, max_iter=50_000).fit(x, y)
    loss = log_loss(y, model.predict_proba(x)) + penalty / 2 * float((model.coef_**2).sum())
    return loss, model.decision_function(x)


def scaled(x: Tensor) -> np.ndarray:
    found = x.double().numpy()
    found = found - found.mean(axis=0)
    return found / np.sqrt((found**2).mean())


@pytest.mark.parametrize("data", ["digits", "anisotropic"])
@pytest.mark.parametrize("penalty", [1e-1, 1e-2, 1e-3])
def test_the_optimum_is_that_of_scikit_learn(
    data: str, penalty: float, request: pytest.FixtureRequest
) -> None:
    x, y = request.getfixturevalue(data)
    expected, logits_nc = least(scaled(x), y.numpy(), penalty)
    found = solve(Rows.of(x, y), int(y.max()) + 1, penalty)
    assert found.converged()
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert found.loss - expected <= found.left + 1e-7 * expected
    mine = scaled(x) @ found.W_dc.numpy() + found.b_c.numpy()
    apart = np.ptp((mine - mine.mean(1, keepdims=True)) - logits_nc + logits_nc.mean(1)[:, None])
    assert apart < 0.05 * np.ptp(logits_nc)
    assert (mine.argmax(1) == logits_nc.argmax(1)).mean() > 0.99


def test_chunks_of_rows_change_nothing(
    anisotropic: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = solve(Rows.of(*anisotropic), C, 1e-2)
    monkeypatch.setattr(probe, "_BLOCK", 24 * 37)
    chunked = solve(Rows.of(*anisotropic), C, 1e-2)
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-12)
    torch.testing.assert_close(chunked.W_dc, whole.W_dc, rtol=1e-6, atol=1e-8)


def test_the_gradient_is_that_of_autograd(anisotropic: tuple[Tensor, Tensor]) -> None:
    rows = Rows.of(*anisotropic)
    point = torch.randn(25, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    point.requires_grad_()
    x = torch.from_numpy(scaled(anisotropic[0]))
    loss = torch.nn.functional.cross_entropy(x @ point[:-1] + point[-1], anisotropic[1])
    loss = loss + 0.3 / 2 * point[:-1].square().sum()
    loss.backward()
    found, gradient = probe._loss(rows, point.detach(), 0.3)
    assert found == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, point.grad, rtol=1e-10, atol=1e-12)


def test_a_probe_is_the_best_penalty_on_every_fifth_row(
    anisotropic: tuple[Tensor, Tensor],
) -> None:
    """The same by hand: each λ on four fifths by scikit-learn, the least loss on the others."""
    x, y = anisotropic
    found = fit_probe(x, y, C)
    held = np.arange(len(y)) % 5 == 4
    all_x, labels = scaled(x), y.numpy()
    losses = {}
    for penalty in PENALTIES[:8]:
        model = LogisticRegression(C=1 / (penalty * (~held).sum()), tol=1e-8, max_iter=20_000)
        model.fit(all_x[~held], labels[~held])
        losses[penalty] = log_loss(labels[held], model.predict_proba(all_x[held]))
    assert found.penalty == min(losses, key=lambda penalty: losses[penalty])
    assert found.loss_validation == pytest.approx(losses[found.penalty], rel=1e-3)
    assert 1e-6 < found.penalty < 1
    logits_nc = (x.double() @ found.W_dc + found.b_c).numpy()  # of features as they are
    expected, theirs = least(all_x, labels, found.penalty)
    assert found.converged
    assert (logits_nc.argmax(1) == theirs.argmax(1)).mean() > 0.99
    assert found.accuracy_train == pytest.approx((logits_nc.argmax(1) == labels).mean())
    shifted = logits_nc - logits_nc.max(axis=1, keepdims=True)
    own = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    assert found.loss_train == pytest.approx(own.mean(), rel=1e-9)
    assert found.loss_train < expected


def test_rotating_and_shifting_the_features_changes_no_prediction(
    anisotropic: tuple[Tensor, Tensor],
) -> None:
    x, y = anisotropic[0].double(), anisotropic[1]
    generator = torch.Generator().manual_seed(1)
    rotation, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))
    turned = x @ rotation * 7 - 3
    one, other = fit_probe(x, y, C), fit_probe(turned, y, C)
    assert one.penalty == other.penalty
    logits, theirs = x @ one.W_dc + one.b_c, turned @ other.W_dc + other.b_c
    assert (logits.argmax(1) == theirs.argmax(1)).all()
    assert other.loss_train == pytest.approx(one.loss_train, rel=1e-3)


def test_it_is_deterministic(digits: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    one = fit_probe(digits[0][:500], digits[1][:500], 10)
    torch.manual_seed(1)
    other = fit_probe(digits[0][:500], digits[1][:500], 10)
    assert torch.equal(one.W_dc, other.W_dc)
    assert torch.equal(one.b_c, other.b_c)


def test_a_class_without_rows_is_rare_and_the_others_are_as_without_it(
    digits: tuple[Tensor, Tensor],
) -> None:
    x, y = digits[0][:500], digits[1][:500]
    probe_12 = fit_probe(x, y + (y >= 4).long(), 12)  # neither 4 nor 11
    probe_10 = fit_probe(x, y, 10)
    assert probe_12.absent == 2
    assert probe_10.absent == 0
    torch.testing.assert_close(probe_12.W_dc[:, [0, 1, 2, 3, *range(5, 11)]], probe_10.W_dc)
    assert float(probe_12.W_dc[:, [4, 11]].abs().max()) == 0
    mean_logits = x.double().mean(0) @ probe_12.W_dc + probe_12.b_c
    p = mean_logits.softmax(0)
    assert p[[4, 11]].numpy() == pytest.approx(1 / len(y), rel=0.01)
    assert probe_12.loss_validation == pytest.approx(probe_10.loss_validation, rel=0.1)


def test_rows_of_one_class_alone(digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits[0][:40], torch.full((40,), 3)
    found = fit_probe(x, y, 10)
    assert found.converged
    assert found.absent == 9
    assert found.accuracy_train == 1
    assert float((x.double() @ found.W_dc).abs().max()) == 0
    assert found.loss_train == pytest.approx(math.log(1 + 9 / 40), rel=1e-9)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_fewer_rows_than_classes(digits: tuple[Tensor, Tensor], n: int) -> None:
    found = fit_probe(digits[0][:n], digits[1][:n], 10)
    assert found.absent == 10 - n  # the first rows are 0, 1, 2, …
    assert found.converged
    assert torch.isfinite(found.W_dc).all()
    assert torch.isfinite(found.b_c).all()
    assert math.isnan(found.loss_validation) == (n < 5)
    assert found.penalty == 1 if n < 5 else found.penalty <= 1


def test_features_that_are_all_alike_give_the_shares_of_the_classes() -> None:
    y = torch.tensor([0, 1, 1, 1] * 10)
    found = fit_probe(torch.full((40, 3), 2.5), y, 2)
    p = (torch.full((3,), 2.5, dtype=torch.float64) @ found.W_dc + found.b_c).softmax(0)
    assert p.numpy() == pytest.approx([0.25, 0.75], rel=1e-3)


def test_what_does_not_converge_says_so(
    anisotropic: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "EVALUATIONS", 5)
    found = solve(Rows.of(*anisotropic), C, 1e-5)
    assert not found.converged()
    assert found.left > 1e-6 * found.loss
    assert not fit_probe(*anisotropic, C).converged


def test_scores_are_the_mean_loss_and_the_share_right(digits: tuple[Tensor, Tensor]) -> None:
    rows = Rows.of(*digits)
    found = solve(rows, 10, 1e-2)
    x = scaled(digits[0])
    p = torch.from_numpy(x @ found.W_dc.numpy() + found.b_c.numpy()).softmax(1).numpy()
    loss, right = scores(rows, found)
    assert loss == pytest.approx(log_loss(digits[1].numpy(), p), rel=1e-9)
    assert right == pytest.approx((p.argmax(1) == digits[1].numpy()).mean())
