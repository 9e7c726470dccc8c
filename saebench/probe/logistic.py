"""Multinomial logistic regression with an L2 penalty, at its optimum.

    minimise over W [d c], b [c]:   mean over n of −log softmax(x̃ W + b)[y]  +  λ/2 ‖W‖²

x̃ are scaled rows (saebench.probe.rows); the optimum is that of scikit-learn's LogisticRegression on
x̃ with C = 1/(λ n). Losses are in nat, sums of them in float64. A class without rows has no optimum
(its bias would go to −∞): it gets no weights, and a bias that gives it about the probability 1/n.

L-BFGS, whose first guess of the inverse Hessian is that of whitened rows (`Whitening`). A start of
another λ is first stretched by the one factor that suits this λ best, and a small λ without a start
is reached over larger ones. Far from the optimum products are bfloat16, where that is faster.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.probe.rows import DenseBlock, Rows, spread
from saebench.probe.solution import Solution
from saebench.probe.whitening import Whitening

TOLERANCE = 1e-4  # of the loss, that may be left to gain
EVALUATIONS = 2000  # of the loss and its gradient, for one λ at most

_HISTORY = 8  # steps that L-BFGS remembers
_SAMPLE = 4096  # rows, that a start is stretched by
_STEP, _ROUGH = 10.0, 0.03  # of λ on the way to a small one, and the tolerance there
_FIRST = 0.02  # a λ that is reached at once
_CONJUGATE = 100  # conjugate gradients at most, of one Newton step
_COARSE = 0.002  # of the loss is left to gain, and more: products may be bfloat16


def solve(
    rows: Rows,
    n_classes: int,
    penalty: float,
    start: Solution | None = None,
    *,
    tolerance: float = TOLERANCE,
    shared: Whitening | None = None,
) -> Solution:
    """The minimum for one λ, once no more than `tolerance` of the loss is left to gain.

    Where it takes too long, or the numbers' precision ends before, what was reached. shared: the
    whitening of these rows or of ones like them; it changes how long it takes, not the minimum.
    """
    present = rows.y_n.unique()
    whitening = shared or Whitening.of(rows)
    point = torch.zeros(rows.d + 1, len(present), dtype=rows.dtype, device=rows.device)
    fit = _Fit(rows, present, n_classes, whitening)
    if start is not None:
        point = torch.cat([start.W_dc, start.b_c.unsqueeze(0)])[:, present].to(rows.dtype)
        point = fit.stretched(point, penalty)
    elif penalty < _FIRST:
        for k in range(math.ceil(math.log(_FIRST / penalty, _STEP)), 0, -1):
            point = fit.stretched(point, penalty * _STEP**k)
            point, *_ = fit.minimum(point, penalty * _STEP**k, _ROUGH, polish=False)
        point = fit.stretched(point, penalty)
    point, loss, left = fit.minimum(point, penalty, tolerance)
    point = point.double()
    W_dc = point.new_zeros(rows.d, n_classes)
    W_dc[:, present] = point[:-1]
    rare = float(point[-1].logsumexp(0)) - math.log(rows.n)
    b_c = point.new_full((n_classes,), rare)
    b_c[present] = point[-1]
    return Solution(W_dc, b_c, loss, left, fit.evaluations, left <= tolerance * loss)


@dataclass(frozen=True, eq=False)
class _Value:
    """The loss with its penalty at a point, its gradient [d + 1, c], and α_c (see whitening)."""

    loss: float
    gradient: Tensor
    alpha_c: Tensor


class _Fit:
    """One set of rows being fitted. A point is W and, as its last row, b: [d + 1, c]."""

    def __init__(self, rows: Rows, present: Tensor, n_classes: int, whitening: Whitening) -> None:
        self.rows, self.whitening = rows, whitening
        self.place_c = torch.zeros(n_classes, dtype=torch.int64, device=rows.device)
        self.place_c[present] = torch.arange(len(present), device=rows.device)
        self.evaluations = 0
        self.quick = rows.dtype == torch.float32 and _bfloat16_is_fast(rows.device)

    def at(self, point: Tensor, penalty: float, coarse: bool = False) -> _Value:
        """coarse: with products of bfloat16, where the rows are dense."""
        self.evaluations += 1
        rows, W_dc, b_c = self.rows, point[:-1], point[-1]
        low_dc = W_dc.bfloat16() if coarse else W_dc
        gradient, alpha_c = torch.zeros_like(point), torch.zeros_like(b_c)
        total = torch.zeros((), dtype=torch.float64, device=point.device)
        for block in rows.blocks():
            low = coarse and isinstance(block, DenseBlock)
            log_mc = block.times(low_dc if low else W_dc).to(W_dc.dtype).add_(b_c)
            torch.log_softmax(log_mc, dim=1, out=log_mc)
            label_m1 = self.place_c[block.y_m].unsqueeze(1)
            own_m1 = log_mc.gather(1, label_m1)
            p_mc = log_mc.exp_()
            alpha_c += p_mc.sum(dim=0)
            alpha_c -= torch.linalg.vector_norm(p_mc, dim=0).square_()
            p_mc.scatter_(1, label_m1, 0.0)
            other_m1 = p_mc.sum(dim=1, keepdim=True)  # 1 − p of the label, without its rounding
            sure_m1 = -torch.log1p(-other_m1.clamp_max(0.5))
            total += torch.where(other_m1 < 0.5, sure_m1, -own_m1).sum(dtype=torch.float64)
            slope_mc = p_mc.scatter_(1, label_m1, -other_m1)
            gradient[:-1] += block.transposed_times(slope_mc.bfloat16() if low else slope_mc)
            gradient[-1] += slope_mc.sum(dim=0)
        gradient /= rows.n
        gradient[:-1] += penalty * W_dc
        loss = float(total) / rows.n + penalty / 2 * _square(W_dc)
        return _Value(loss, gradient, (alpha_c / rows.n).clamp_min_(1e-3 / rows.n))

    def stretched(self, point: Tensor, penalty: float) -> Tensor:
        """The point times the factor that makes the loss least on some of the rows."""
        n = self.rows.n
        keep_n = torch.zeros(n, dtype=torch.bool, device=point.device)
        keep_n[spread(n, _SAMPLE, point.device)] = True
        some = self.rows.where(keep_n) if n > _SAMPLE else self.rows
        found = [(block.times(point[:-1]).add_(point[-1]), block.y_m) for block in some.blocks()]
        logits_mc = torch.cat([logits for logits, _ in found])
        label_m1 = self.place_c[torch.cat([y_m for _, y_m in found])].unsqueeze(1)
        own, square = float(logits_mc.gather(1, label_m1).mean()), penalty * _square(point[:-1])
        low, high = -2.0, 2.0  # of the factor's logarithm
        for _ in range(12):
            middle = (low + high) / 2
            factor = math.exp(middle)
            p_mc = (logits_mc * factor).softmax(dim=1)
            slope = float((p_mc * logits_mc).sum(dim=1).mean()) - own + factor * square
            low, high = (low, middle) if slope > 0 else (middle, high)
        return point * math.exp((low + high) / 2)

    def minimum(
        self, point: Tensor, penalty: float, tolerance: float, *, polish: bool = True
    ) -> tuple[Tensor, float, float]:
        """From a point on: where it ends, the loss there, and what is left of it.

        polish: whether the end is of full precision wherever it began.
        """
        coarse = self.quick
        value = self.at(point, penalty, coarse)
        curvature = self.whitening.curvature(value.alpha_c, penalty)
        memory: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=_HISTORY)
        gains: deque[float] = deque(maxlen=5)
        while True:
            step = self._step(value.gradient, curvature, memory)
            promised = _dot(value.gradient, step)
            left = _left(promised, gains)
            if coarse and polish and left <= max(_COARSE, tolerance) * value.loss:
                coarse, value = False, self.at(point, penalty)
                continue
            if self.evaluations >= EVALUATIONS or (left <= tolerance * value.loss and not polish):
                break
            if left <= tolerance * value.loss:  # it seems so: see
                step, left = self._newton(point, value.gradient, penalty, curvature, memory)
                if left <= tolerance * value.loss:
                    break
                promised = _dot(value.gradient, step)
            found = self._search(point, value, step, promised, penalty, coarse)
            if found is None:
                if coarse and polish:
                    coarse, value = False, self.at(point, penalty)
                    continue
                if not memory:
                    break
                memory.clear()  # what it remembers may be to blame
                curvature = self.whitening.curvature(value.alpha_c, penalty)
                continue
            length, new = found
            moved, turned = step.mul_(-length), new.gradient - value.gradient
            along = _dot(moved, turned)
            if along > 0:
                memory.append((moved, turned, along))
            point = point + moved
            gains.append(value.loss - new.loss)
            value = new
        return point, value.loss, left

    def _step(
        self, gradient: Tensor, curvature: Tensor, memory: deque[tuple[Tensor, Tensor, float]]
    ) -> Tensor:
        """The inverse Hessian as it is known, times the gradient (Nocedal & Wright, 7.4)."""
        step, shares = gradient.clone(), []
        for moved, turned, along in reversed(memory):
            shares.append(_dot(moved, step) / along)
            step.sub_(turned, alpha=shares[-1])
        step = self.whitening.divide(step, curvature)
        if memory:
            _, turned, along = memory[-1]
            step *= along / _dot(turned, self.whitening.divide(turned, curvature))
        for (moved, turned, along), share in zip(memory, reversed(shares), strict=True):
            step.add_(moved, alpha=share - _dot(turned, step) / along)
        return step

    def _newton(
        self,
        point: Tensor,
        gradient: Tensor,
        penalty: float,
        curvature: Tensor,
        memory: deque[tuple[Tensor, Tensor, float]],
    ) -> tuple[Tensor, float]:
        """The step by the true Hessian, and what a quadratic of it holds: gᵀH⁻¹g/2.

        By conjugate gradients, each of which adds to the sum, until three in turn add little. As
        the last of it may take many more to find, twice the sum is returned.
        """
        step, rest = torch.zeros_like(gradient), gradient.clone()
        direction = self._step(rest, curvature, memory)
        size, held, gain, calm = _dot(rest, direction), 0.0, 0.0, 0
        for _ in range(_CONJUGATE):
            if size <= 0:
                break
            bent = self._bent(point, direction, penalty)
            along = _dot(direction, bent)
            if along <= 0:  # the numbers' precision ends here
                break
            share = size / along
            step.add_(direction, alpha=share)
            rest.sub_(bent, alpha=share)
            gain = share * size
            held += gain
            calm = calm + 1 if gain <= 0.05 * held else 0
            if calm == 3:
                break
            toward = self._step(rest, curvature, memory)
            size, before = _dot(rest, toward), size
            direction = toward.add_(direction, alpha=size / before)
        return step, held + 10 * gain

    def _bent(self, point: Tensor, direction: Tensor, penalty: float) -> Tensor:
        """The Hessian times a direction, both [d + 1, c]."""
        self.evaluations += 1
        bent, both = torch.zeros_like(point), torch.cat([point, direction], dim=1)
        for block in self.rows.blocks():
            found = block.times(both[:-1]).add_(both[-1])
            logits_mc, along_mc = found.chunk(2, dim=1)
            p_mc = logits_mc.softmax(dim=1)
            along_mc *= p_mc
            along_mc -= p_mc.mul_(along_mc.sum(dim=1, keepdim=True))
            bent[:-1] += block.transposed_times(along_mc)
            bent[-1] += along_mc.sum(dim=0)
        bent /= self.rows.n
        bent[:-1] += penalty * direction[:-1]
        return bent

    def _search(
        self,
        point: Tensor,
        value: _Value,
        step: Tensor,
        promised: float,
        penalty: float,
        coarse: bool,
    ) -> tuple[float, _Value] | None:
        """How far to go along −step, and what is there; None where nothing is gained any more."""
        length = 1.0
        for _ in range(12):
            new = self.at(point - length * step, penalty, coarse)
            gain = value.loss - new.loss
            if gain > 1e-4 * length * promised:
                return length, new
            bend = length * promised - gain
            least = length * length * promised / (2 * bend) if bend > 0 else 0.0
            length = min(max(least, 0.1 * length), 0.5 * length) if gain == gain else 0.1 * length
        return None


def _left(promised: float, gains: deque[float]) -> float:
    """What seems left to gain: twice what a quadratic of the curvature as it is known holds, and no
    less than the last gains would add up to, did they go on falling at their rate.
    """
    left = promised
    if len(gains) > 2 and gains[0] > 0:
        rate = min((gains[-1] / gains[0]) ** (1 / (len(gains) - 1)), 0.95)
        left = max(left, gains[-1] * rate / (1 - rate))
    return left


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def _square(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a, dtype=torch.float64)) ** 2


def _bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 as such."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    said = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return said is not None and said()
