"""Multinomial logistic regression with an L2 penalty, at its optimum.

    minimise over W [d c], b [c]:   mean over n of −log softmax(x̃ W + b)[y]  +  λ/2 ‖W‖²

x̃ are scaled rows (saebench.probe.rows); the optimum is that of scikit-learn's LogisticRegression on
x̃ with C = 1/(λ n). Losses are in nat, sums of them in float64. A class without rows has no optimum
(its bias would go to −∞): it gets no weights, and a bias that gives it about the probability 1/n.

L-BFGS, whose first guess of the inverse Hessian is a curvature of the loss itself (`curvature`). A
start of another λ is first stretched by the one factor that suits this λ best; without a start, one
is found on few of the rows, over larger λ to a small one. Far from the optimum products are
bfloat16, where that is faster. It ends once a Newton step (`newton`) has little left to gain.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from saebench.probe.curvature import (
    SAMPLE,
    Blocks,
    Curvature,
    Spectrum,
    Whitening,
    have_room,
)
from saebench.probe.newton import newton_step
from saebench.probe.objective import Objective, Value, dot, doubting
from saebench.probe.rows import DenseRows, Rows, spread
from saebench.probe.solution import Solution

TOLERANCE = 1e-4  # of the loss, that may be left to gain
PASSES = 1000  # over the rows, for one λ at most

_Memory = deque[tuple[Tensor, Tensor, float]]
"""Steps, the change of the gradient over each, and the product of the two."""

_HISTORY = 10  # steps that L-BFGS remembers
_STEP, _ROUGH = 10.0, 0.03  # of λ on the way to a small one, and the tolerance there
_FIRST = 0.05  # a λ that is reached at once
_COARSE = 0.002  # of the loss is left to gain, and more: products may be bfloat16
_NEAR = 10  # times the tolerance is left: from here on doubts are told


def solve(
    rows: Rows,
    n_classes: int,
    penalty: float,
    start: Solution | None = None,
    *,
    tolerance: float = TOLERANCE,
    shared: Spectrum | None = None,
) -> Solution:
    """The minimum for one λ, once no more than `tolerance` of the loss is left to gain.

    Where it takes too long, or the numbers' precision ends before, what was reached. shared: the
    spectrum of these rows or of ones like them; it changes how long it takes, not the minimum.
    """
    present = rows.y_n.unique()
    spectrum = shared or Spectrum.of(rows)
    some = rows.taken(spread(rows.n, SAMPLE, rows.device))
    objective = Objective(some if some.n == rows.n else rows, present, n_classes, rows.n)
    few = objective.of(some)
    memory = _Memory(maxlen=_HISTORY)
    if start is not None:
        point = torch.cat([start.W_dc, start.b_c.unsqueeze(0)])[:, present].to(rows.dtype)
        point, _ = few.stretched(point, penalty)
    else:
        point, memory = _begun(objective, few, penalty, spectrum)
    fit = _Fit(objective, penalty, spectrum)
    point, loss, left = fit.minimum(point, tolerance, memory)
    point = point.double()
    W_dc = point.new_zeros(rows.d, n_classes)
    W_dc[:, present] = point[:-1]
    rare = float(point[-1].logsumexp(0)) - math.log(rows.n)
    b_c = point.new_full((n_classes,), rare)
    b_c[present] = point[-1]
    passes = math.ceil(objective.spent + few.spent)
    return Solution(W_dc, b_c, loss, left, passes, left <= tolerance * loss)


def _begun(
    objective: Objective, few: Objective, penalty: float, spectrum: Spectrum
) -> tuple[Tensor, _Memory]:
    """A start, from few of the rows and over larger λ, and the steps of the last rung."""
    rows, n_classes = objective.rows, len(objective.present)
    point = torch.zeros(rows.d + 1, n_classes, dtype=rows.dtype, device=rows.device)
    ladder = max(math.ceil(math.log(_FIRST / penalty, _STEP)), 0)
    if few.rows.n == rows.n:  # the last rung is the fit itself
        for k in range(ladder, 0, -1):
            point, _ = _rung(few, point, penalty * _STEP**k, spectrum, first=k == ladder)
        return (few.stretched(point, penalty)[0] if ladder else point), _Memory(maxlen=_HISTORY)
    # Few rows are fitted too well where λ is small: the rung that suits others best is the start.
    shift = rows.n // few.rows.n // 2
    unseen = objective.of(rows.taken(spread(rows.n, SAMPLE, rows.device) + shift))
    found: tuple[float, Tensor, _Memory] | None = None
    for k in range(ladder, -1, -1):
        point, memory = _rung(few, point, penalty * _STEP**k, spectrum, first=k == ladder)
        start, loss = unseen.stretched(point, penalty)
        if found is not None and loss >= found[0]:
            break
        found = loss, start, memory if k == 0 else _Memory(maxlen=_HISTORY)
    objective.spent += unseen.spent
    assert found is not None
    return found[1], found[2]


def _rung(
    few: Objective, point: Tensor, penalty: float, spectrum: Spectrum, *, first: bool
) -> tuple[Tensor, _Memory]:
    """A rough minimum for a λ on the way, and the last steps to it."""
    if not first:
        point, _ = few.stretched(point, penalty)
    memory = _Memory(maxlen=_HISTORY)
    point, *_ = _Fit(few, penalty, spectrum).minimum(point, _ROUGH, memory, polish=False)
    return point, memory


class _Fit:
    """One λ over some rows."""

    def __init__(self, objective: Objective, penalty: float, spectrum: Spectrum) -> None:
        self.objective, self.penalty, self.spectrum = objective, penalty, spectrum
        rows = objective.rows
        self.quick = rows.dtype == torch.float32 and _bfloat16_is_fast(rows.device)

    def minimum(
        self, point: Tensor, tolerance: float, memory: _Memory, *, polish: bool = True
    ) -> tuple[Tensor, float, float]:
        """From a point on: where it ends, the loss there, and what is left of it.

        memory: steps of a fit like it, to which its own are added. polish: whether a Newton step
        has to say so at the end.
        """
        objective, penalty = self.objective, self.penalty
        coarse = self.quick and objective.rows.d > 128  # below, most of the time is not in products
        value = objective.at(point, penalty, doubts=True, coarse=coarse)
        curvature = self._curvature(point, value)
        gains: deque[float] = deque(maxlen=5)
        near, left = False, math.inf
        while True:
            step = _step(value.gradient, curvature, memory)
            promised = dot(value.gradient, step)
            left = _left(promised, gains)
            near = near or left <= _NEAR * tolerance * value.loss
            if coarse and polish and left <= max(_COARSE, tolerance) * value.loss:
                coarse, value = False, objective.at(point, penalty, doubts=near)
                continue
            if objective.spent >= PASSES or (not polish and left <= tolerance * value.loss):
                break
            if left <= tolerance * value.loss:  # it seems so: see
                if value.doubt_n is None:
                    value = objective.at(point, penalty, doubts=True)
                divide = _divider(curvature, memory)
                step, left = newton_step(objective, point, value, penalty, self.spectrum, divide)
                if left <= tolerance * value.loss:
                    break
                promised = dot(value.gradient, step)
            found = self._search(point, value, step, promised, near, coarse)
            if found is None:
                if coarse and polish:
                    coarse, value = False, objective.at(point, penalty, doubts=near)
                    continue
                if not memory:
                    break
                memory.clear()  # what it remembers may be to blame
                value = objective.at(point, penalty, doubts=True, coarse=coarse)
                curvature = self._curvature(point, value)
                continue
            length, new = found
            moved, turned = step.mul_(-length), new.gradient - value.gradient
            along = dot(moved, turned)
            if along > 0:
                memory.append((moved, turned, along))
            point = point + moved
            gains.append(value.loss - new.loss)
            value = new
        return point, value.loss, left

    def _curvature(self, point: Tensor, value: Value) -> Curvature:
        """value: with doubts."""
        assert value.doubt_n is not None
        assert value.doubt_c is not None
        rows = self.objective.rows
        if have_room(rows, point.shape[1]):
            some = self.objective.of(rows.taken(doubting(value.doubt_n)))
            if isinstance(some.rows, DenseRows):
                p_mc = some.logits(point)[0].softmax(dim=1)
                others_c = value.doubt_c - (p_mc - p_mc.square()).sum(dim=0) / rows.n
                x_md = torch.cat([block.x_md for block in some.rows.blocks()])
                own = p_mc, rows.n, others_c.clamp_min_(0), self.spectrum, self.penalty
                return Blocks.of(x_md, *own)
        return Whitening.of(self.spectrum, value.doubt_c, self.penalty)

    def _search(
        self,
        point: Tensor,
        value: Value,
        step: Tensor,
        promised: float,
        doubts: bool,
        coarse: bool,
    ) -> tuple[float, Value] | None:
        """How far to go along −step, and what is there; None where nothing is gained any more."""
        length = 1.0
        for _ in range(12):
            new = self.objective.at(
                point - length * step, self.penalty, doubts=doubts, coarse=coarse
            )
            gain = value.loss - new.loss
            if gain > 1e-4 * length * promised:
                return length, new
            bend = length * promised - gain
            least = length * length * promised / (2 * bend) if bend > 0 else 0.0
            length = min(max(least, 0.1 * length), 0.5 * length) if gain == gain else 0.1 * length
        return None


def _step(gradient: Tensor, curvature: Curvature, memory: _Memory) -> Tensor:
    """The inverse Hessian as it is known, times the gradient (Nocedal & Wright, 7.4)."""
    step, shares = gradient.clone(), []
    for moved, turned, along in reversed(memory):
        shares.append(dot(moved, step) / along)
        step.sub_(turned, alpha=shares[-1])
    step = curvature.divide(step)
    if memory:
        _, turned, along = memory[-1]
        step *= along / dot(turned, curvature.divide(turned))
    for (moved, turned, along), share in zip(memory, reversed(shares), strict=True):
        step.add_(moved, alpha=share - dot(turned, step) / along)
    return step


def _divider(curvature: Curvature, memory: _Memory) -> Callable[[Tensor], Tensor]:
    return lambda gradient: _step(gradient, curvature, memory)


def _left(promised: float, gains: deque[float]) -> float:
    """What seems left to gain: twice what a quadratic of the curvature as it is known holds, and no
    less than the last gains would add up to, did they go on falling at their rate.
    """
    left = promised
    if len(gains) > 2 and gains[0] > 0:
        rate = min((max(gains[-1], 0.0) / gains[0]) ** (1 / (len(gains) - 1)), 0.95)
        left = max(left, gains[-1] * rate / (1 - rate))
    return left


def _bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 as such."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    said = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return said is not None and said()
