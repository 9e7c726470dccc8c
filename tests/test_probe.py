"""The probe's solver, held to scikit-learn's LogisticRegression at its optimum."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from saebench.probe import PENALTIES, DenseRows, Probe, fit_probe, logistic, rows, scores, solve
from saebench.probe.curvature import Blocks, Spectrum, Whitening
from saebench.probe.newton import newton_step
from saebench.probe.objective import Objective

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


def fitted(x: Tensor, y: Tensor, n_classes: int, *, refit: bool = True) -> Probe:
    """With every fifth row held."""
    held_n = torch.arange(len(y)) % 5 == 4
    return fit_probe(DenseRows.of(x, y), held_n, n_classes, refit=refit)


def cost(x_nd: np.ndarray, y: Tensor, W_dc: Tensor, b_c: Tensor, penalty: float) -> float:
    """The objective in float64, over the classes that have rows."""
    present, labels = y.unique(return_inverse=True)
    logits_nc = (torch.from_numpy(x_nd) @ W_dc + b_c)[:, present]
    loss = torch.nn.functional.cross_entropy(logits_nc, labels)
    return float(loss + penalty / 2 * W_dc.square().sum())


@pytest.mark.parametrize("data", ["digits", "anisotropic"])
@pytest.mark.parametrize("penalty", [1e-1, 1e-2, 1e-3])
def test_the_optimum_is_that_of_scikit_learn(
    data: str, penalty: float, request: pytest.FixtureRequest
) -> None:
    x, y = request.getfixturevalue(data)
    n_classes = int(y.max()) + 1
    expected, logits_nc = least(scaled(x), y.numpy(), penalty)
    found = solve(DenseRows.of(x, y, torch.float64), n_classes, penalty, tolerance=1e-8)
    assert found.converged
    assert found.loss == pytest.approx(expected, rel=1e-7)
    mine = scaled(x) @ found.W_dc.numpy() + found.b_c.numpy()
    apart = np.ptp((mine - mine.mean(1, keepdims=True)) - logits_nc + logits_nc.mean(1)[:, None])
    assert apart < 0.01 * np.ptp(logits_nc)
    quick = solve(DenseRows.of(x, y), n_classes, penalty)
    assert quick.converged
    assert cost(scaled(x), y, quick.W_dc, quick.b_c, penalty) <= expected * (1 + 1e-4)
    assert quick.evaluations < found.evaluations


def hard(kind: str) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(1)
    n, d, c = {"tiny": (7, 3, 3), "wide": (60, 150, 5)}.get(kind, (300, 12, 5))
    y = rng.permutation(np.arange(n) % c)
    if kind == "absent":
        y[y == 2] = 3
    if kind == "sorted":
        y = np.sort(y)
    x = rng.normal(size=(c, d))[y] * (8 if kind == "separable" else 0.5) + rng.normal(size=(n, d))
    if kind == "ill-conditioned":
        x *= np.logspace(0, -4, d)
    if kind == "constant":
        x[:, 3:6] = 2
    return torch.from_numpy(x), torch.from_numpy(y)


KINDS = ["ill-conditioned", "separable", "tiny", "wide", "constant", "absent", "sorted"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [1.0, 1e-3, 1e-6])
def test_a_fit_that_says_it_converged_is_as_near_as_it_says(kind: str, penalty: float) -> None:
    x, y = hard(kind)
    n_classes = int(y.max()) + 1
    exact = solve(DenseRows.of(x, y, torch.float64), n_classes, penalty, tolerance=1e-9)
    assert exact.converged
    found = solve(DenseRows.of(x.float(), y), n_classes, penalty)
    assert found.converged
    own = cost(scaled(x), y, found.W_dc, found.b_c, penalty)
    assert own <= exact.loss * (1 + 1e-4)
    assert own - exact.loss <= 3 * found.left + 1e-5 * own  # an estimate
    assert own == pytest.approx(found.loss, rel=2e-5)


def test_a_start_moves_no_optimum(anisotropic: tuple[Tensor, Tensor]) -> None:
    own = DenseRows.of(*anisotropic)
    cold = solve(own, C, 1e-3)
    start = solve(own, C, 1e-2)
    warm = solve(own, C, 1e-3, start, shared=Spectrum.of(own))
    assert warm.loss == pytest.approx(cold.loss, rel=2e-4)
    assert warm.evaluations < cold.evaluations
    again = solve(own, C, 1e-3, warm)
    assert again.loss <= warm.loss * (1 + 1e-6)
    assert again.evaluations < warm.evaluations


def test_blocks_of_rows_change_nothing(
    anisotropic: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = anisotropic
    whole = solve(DenseRows.of(x, y, torch.float64), C, 1e-2, tolerance=1e-9)
    monkeypatch.setattr(rows, "BLOCK", 24 * 37)
    own = DenseRows.of(x, y, torch.float64)
    assert len(list(own.blocks())) == 17
    blocked = solve(own, C, 1e-2, tolerance=1e-9)
    assert blocked.loss == pytest.approx(whole.loss, rel=1e-6)
    torch.testing.assert_close(blocked.W_dc, whole.W_dc, rtol=1e-3, atol=1e-4)


def test_blocks_are_scaled_rows_and_their_products(anisotropic: tuple[Tensor, Tensor]) -> None:
    x, y = anisotropic
    keep_n = torch.arange(len(y)) % 3 > 0
    own = DenseRows.of(x, y, torch.float64).where(keep_n)
    expected = torch.from_numpy(scaled(x))[keep_n]
    (block,) = own.blocks()
    assert torch.equal(block.y_m, y[keep_n])
    W_dc, R_mc = torch.randn(24, 5, dtype=torch.float64), torch.randn(own.n, 5, dtype=torch.float64)
    torch.testing.assert_close(block.times(W_dc), expected @ W_dc)
    torch.testing.assert_close(block.transposed_times(R_mc), expected.T @ R_mc)
    torch.testing.assert_close(own.covariance(10_000), expected.T @ expected / own.n)


def at_a_point(
    data: tuple[Tensor, Tensor], penalty: float
) -> tuple[Objective, Tensor, Callable[[Tensor], Tensor]]:
    """The objective of all rows, a point, and the same function for autograd."""
    own = DenseRows.of(*data, torch.float64)
    generator = torch.Generator().manual_seed(0)
    point = 0.3 * torch.randn(own.d + 1, C, generator=generator, dtype=torch.float64)
    x, y = torch.from_numpy(scaled(data[0])), data[1]

    def f(at: Tensor) -> Tensor:
        loss = torch.nn.functional.cross_entropy(x @ at[:-1] + at[-1], y)
        return loss + penalty / 2 * at[:-1].square().sum()

    return Objective(own, own.y_n.unique(), C, own.n), point, f


def test_the_gradient_is_that_of_autograd(anisotropic: tuple[Tensor, Tensor]) -> None:
    objective, point, f = at_a_point(anisotropic, 0.3)
    value = objective.at(point, 0.3, doubts=True)
    assert value.loss == pytest.approx(float(f(point)), rel=1e-12)
    (gradient,) = torch.autograd.grad(f(point.requires_grad_()), point)
    torch.testing.assert_close(value.gradient, gradient, rtol=1e-9, atol=1e-12)
    point = point.detach()
    p = (torch.from_numpy(scaled(anisotropic[0])) @ point[:-1] + point[-1]).softmax(1)
    assert value.doubt_c is not None
    torch.testing.assert_close(value.doubt_c, (p * (1 - p)).mean(0))
    torch.testing.assert_close(value.doubt_n, (p * (1 - p)).sum(1))


def test_a_start_is_stretched_by_the_best_factor(anisotropic: tuple[Tensor, Tensor]) -> None:
    objective, _, f = at_a_point(anisotropic, 1e-3)
    found = solve(objective.rows, C, 1e-2)
    point = torch.cat([found.W_dc, found.b_c[None]])
    longer, loss = objective.stretched(point, 1e-3)
    factor = float((longer / point)[0, 0])
    assert factor > 1.1
    assert loss == pytest.approx(float(f(longer)), rel=1e-9)
    assert loss <= min(float(f(point * (factor + side))) for side in (-0.02, 0.02))


def test_a_newton_step_is_that_of_the_true_hessian(anisotropic: tuple[Tensor, Tensor]) -> None:
    objective, point, f = at_a_point(anisotropic, 0.3)
    value = objective.at(point, 0.3, doubts=True)
    assert value.doubt_c is not None
    spectrum = Spectrum.of(objective.rows)
    whitening = Whitening.of(spectrum, value.doubt_c, 0.3)
    step, left = newton_step(objective, point, value, 0.3, spectrum, whitening.divide)
    _, bent = torch.autograd.functional.hvp(f, point, step)
    assert isinstance(bent, Tensor)
    assert float((bent - value.gradient).norm() / value.gradient.norm()) < 0.1
    held = float((value.gradient * step).sum()) / 2
    assert held <= left <= 2 * held


def test_rows_that_doubt_most_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left at a point near the optimum, from a fifth of the rows."""
    rng = np.random.default_rng(2)
    y = torch.from_numpy(rng.permutation(np.arange(3000) % C))
    x = torch.from_numpy(rng.normal(size=(C, 24))[y.numpy()] + rng.normal(size=(3000, 24)))
    own = DenseRows.of(x, y, torch.float64)
    exact = solve(own, C, 1e-4, tolerance=1e-9)
    near = solve(own, C, 1e-4, tolerance=3e-2)
    objective = Objective(own, y.unique(), C, own.n)
    point = torch.cat([near.W_dc, near.b_c[None]])
    value = objective.at(point, 1e-4, doubts=True)
    assert value.doubt_c is not None
    monkeypatch.setattr("saebench.probe.objective.CHOSEN", 600)
    spectrum = Spectrum.of(own)
    divide = Whitening.of(spectrum, value.doubt_c, 1e-4).divide
    _, left = newton_step(objective, point, value, 1e-4, spectrum, divide)
    assert 0.7 < left / (value.loss - exact.loss) < 4


def test_blocks_are_the_hessian_of_each_class(anisotropic: tuple[Tensor, Tensor]) -> None:
    objective, point, f = at_a_point(anisotropic, 0.3)
    logits_nc, _ = objective.logits(point)
    x_nd = torch.from_numpy(scaled(anisotropic[0]))
    p_nc = logits_nc.softmax(1)
    spectrum = Spectrum.of(objective.rows)
    blocks = Blocks.of(x_nd, p_nc, len(p_nc), torch.zeros(C), spectrum, 0.3)
    hessian = torch.autograd.functional.hessian(f, point)
    assert isinstance(hessian, Tensor)
    for k in range(C):
        own = hessian[:, k, :, k]
        gradient = torch.zeros_like(point)
        gradient[:, k] = torch.randn(25, dtype=torch.float64)
        found = blocks.divide(gradient)
        torch.testing.assert_close(own @ found[:, k], gradient[:, k], rtol=1e-2, atol=1e-3)


def test_a_start_comes_of_few_rows_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    y = torch.from_numpy(rng.permutation(np.arange(2400) % C))
    x = torch.from_numpy(rng.normal(size=(C, 30))[y.numpy()] * 0.7 + rng.normal(size=(2400, 30)))
    whole = {penalty: solve(DenseRows.of(x, y), C, penalty) for penalty in (0.1, 1e-3, 1e-6)}
    monkeypatch.setattr(logistic, "SAMPLE", 300)
    for penalty, expected in whole.items():
        found = solve(DenseRows.of(x, y), C, penalty)
        assert found.converged
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)


def test_a_probe_is_the_best_penalty_on_every_fifth_row(
    anisotropic: tuple[Tensor, Tensor],
) -> None:
    """The same by hand: each λ on four fifths by scikit-learn, the least loss on the others."""
    x, y = anisotropic
    found = fitted(x, y, C)
    held = np.arange(len(y)) % 5 == 4
    all_x, labels = scaled(x), y.numpy()
    losses = {}
    for penalty in PENALTIES[:6]:
        model = LogisticRegression(C=1 / (penalty * (~held).sum()), tol=1e-8, max_iter=20_000)
        model.fit(all_x[~held], labels[~held])
        losses[penalty] = log_loss(labels[held], model.predict_proba(all_x[held]))
    assert losses[found.penalty] < 1.005 * min(losses.values())
    assert found.loss_validation == pytest.approx(losses[found.penalty], rel=5e-3)
    assert 1e-6 < found.penalty < 1
    logits_nc = (x.double() @ found.W_dc + found.b_c).numpy()  # of features as they are
    expected, theirs = least(all_x, labels, found.penalty)
    assert found.converged
    assert (logits_nc.argmax(1) == theirs.argmax(1)).mean() > 0.99
    assert found.accuracy_train == pytest.approx((logits_nc.argmax(1) == labels).mean())
    shifted = logits_nc - logits_nc.max(axis=1, keepdims=True)
    own = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    assert found.loss_train == pytest.approx(own.mean(), rel=1e-6)
    assert found.loss_train < expected


def test_rotating_and_shifting_the_features_changes_no_prediction(
    anisotropic: tuple[Tensor, Tensor],
) -> None:
    x, y = anisotropic[0].double(), anisotropic[1]
    generator = torch.Generator().manual_seed(1)
    rotation, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))
    turned = x @ rotation * 7 - 3
    one, other = fitted(x, y, C), fitted(turned, y, C)
    assert one.penalty == other.penalty
    logits, theirs = x @ one.W_dc + one.b_c, turned @ other.W_dc + other.b_c
    assert (logits.argmax(1) == theirs.argmax(1)).all()
    assert other.loss_train == pytest.approx(one.loss_train, rel=1e-3)


def test_it_is_deterministic(digits: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    one = fitted(digits[0][:500], digits[1][:500], 10)
    torch.manual_seed(1)
    other = fitted(digits[0][:500], digits[1][:500], 10)
    assert torch.equal(one.W_dc, other.W_dc)
    assert torch.equal(one.b_c, other.b_c)


def test_a_class_without_rows_is_rare_and_the_others_are_as_without_it(
    digits: tuple[Tensor, Tensor],
) -> None:
    x, y = digits[0][:500], digits[1][:500]
    probe_12 = fitted(x, y + (y >= 4).long(), 12)  # neither 4 nor 11
    probe_10 = fitted(x, y, 10)
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
    found = fitted(x, y, 10)
    assert found.converged
    assert found.absent == 9
    assert found.accuracy_train == 1
    assert float((x.double() @ found.W_dc).abs().max()) == 0
    assert found.loss_train == pytest.approx(math.log(1 + 9 / 40), rel=1e-6)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_fewer_rows_than_classes(digits: tuple[Tensor, Tensor], n: int) -> None:
    found = fitted(digits[0][:n], digits[1][:n], 10)
    assert found.absent == 10 - n  # the first rows are 0, 1, 2, …
    assert found.converged
    assert torch.isfinite(found.W_dc).all()
    assert torch.isfinite(found.b_c).all()
    assert math.isnan(found.loss_validation) == (n < 5)
    assert found.penalty == 1 if n < 5 else found.penalty <= 1


def test_features_that_are_all_alike_give_the_shares_of_the_classes() -> None:
    y = torch.tensor([0, 1, 1, 1] * 10)
    found = fitted(torch.full((40, 3), 2.5), y, 2)
    p = (torch.full((3,), 2.5, dtype=torch.float64) @ found.W_dc + found.b_c).softmax(0)
    assert p.numpy() == pytest.approx([0.25, 0.75], rel=5e-3)


def test_what_does_not_converge_says_so(
    anisotropic: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logistic, "PASSES", 5)
    found = solve(DenseRows.of(*anisotropic), C, 1e-5)
    assert not found.converged
    assert found.left > 1e-4 * found.loss
    assert not fitted(*anisotropic, C).converged


def test_without_a_refit_the_probe_is_the_one_that_saw_no_held_row(
    anisotropic: tuple[Tensor, Tensor],
) -> None:
    x, y = anisotropic
    held_n = torch.arange(len(y)) % 5 == 4
    found = fitted(x, y, C, refit=False)
    theirs = torch.nn.functional.cross_entropy(
        x.double() @ found.W_dc + found.b_c, y, reduction="none"
    )
    assert float(theirs[held_n].mean()) == pytest.approx(found.loss_validation, rel=5e-3)
    assert float(theirs[~held_n].mean()) == pytest.approx(found.loss_train, rel=1e-4)
    with_them = fitted(x, y, C)
    assert with_them.penalty == found.penalty
    assert with_them.loss_validation == found.loss_validation
    assert not torch.equal(with_them.W_dc, found.W_dc)


def test_scores_are_the_mean_loss_and_the_share_right(digits: tuple[Tensor, Tensor]) -> None:
    rows = DenseRows.of(*digits)
    found = solve(rows, 10, 1e-2)
    x = scaled(digits[0])
    p = torch.from_numpy(x @ found.W_dc.numpy() + found.b_c.numpy()).softmax(1).numpy()
    loss, right = scores(rows, found)
    assert loss == pytest.approx(log_loss(digits[1].numpy(), p), rel=1e-6)
    assert right == pytest.approx((p.argmax(1) == digits[1].numpy()).mean())
