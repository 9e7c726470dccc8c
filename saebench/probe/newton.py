"""A Newton step from few rows, and what it says is left to gain.

The Hessian is taken from the rows that doubt most, and of the others on average:

    H V = mean over the chosen rows of x̃ (diag p − p pᵀ) x̃ᵀ V  +  Σ V diag(w)  +  λ V

with w the mean doubts of the others and Σ the covariance of all. The step H⁻¹g comes of conjugate
gradients, each of which adds to gᵀH⁻¹g/2: what a quadratic of that Hessian holds to be left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saebench.probe.curvature import Spectrum
from saebench.probe.objective import Objective, Value, dot, doubting

CONJUGATE = 60  # conjugate gradients at most


def newton_step(
    objective: Objective,
    point: Tensor,
    value: Value,
    penalty: float,
    spectrum: Spectrum,
    divide: Callable[[Tensor], Tensor],
) -> tuple[Tensor, float]:
    """The step, to be subtracted, and what is left: the sum and a margin for what it may miss.

    value: with doubts. divide: an approximate inverse of the Hessian.
    """
    assert value.doubt_n is not None
    assert value.doubt_c is not None
    rows = objective.rows
    chosen = objective.of(rows.taken(doubting(value.doubt_n)))
    logits_mc, _ = chosen.logits(point)
    p_mc = logits_mc.softmax(dim=1)
    others_c = (value.doubt_c - (p_mc - p_mc.square()).sum(dim=0) / rows.n).clamp_min_(0)
    some = chosen.rows.n < rows.n

    def bent(direction: Tensor) -> Tensor:
        found = torch.zeros_like(direction)
        begin = 0
        for block in chosen.rows.blocks():
            along_mc = block.times(direction[:-1]).add_(direction[-1])
            own_mc = p_mc[begin : begin + len(along_mc)]
            begin += len(along_mc)
            along_mc *= own_mc
            along_mc -= own_mc * along_mc.sum(dim=1, keepdim=True)
            found[:-1] += block.transposed_times(along_mc)
            found[-1] += along_mc.sum(dim=0)
        found /= rows.n
        found[:-1].add_(direction[:-1], alpha=penalty)
        if some:
            found[:-1] += spectrum.times(direction[:-1]) * others_c
            found[-1] += direction[-1] * others_c
        return found

    step, rest = torch.zeros_like(point), value.gradient.clone()
    direction = divide(rest)
    size, held, gain, calm = dot(rest, direction), 0.0, 0.0, 0
    for _ in range(CONJUGATE):
        if size <= 0:
            break
        turned = bent(direction)
        objective.spent += chosen.rows.n / objective.n_all
        along = dot(direction, turned)
        if along <= 0:  # the numbers' precision ends here
            break
        share = size / along
        step.add_(direction, alpha=share)
        rest.sub_(turned, alpha=share)
        gain = share * size / 2
        held += gain
        calm = calm + 1 if gain <= 0.05 * held else 0
        if calm == 2:
            break
        toward = divide(rest)
        size, before = dot(rest, toward), size
        direction = toward.add_(direction, alpha=size / before)
    return step, (1.5 if some else 1.1) * held + 5 * gain
