"""scikit-learn's logistic regression, stopped at the first iteration that is near enough.

What it takes to find that out is not counted: this is the loosest tolerance that suffices.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
from sklearn.linear_model import LogisticRegression, _logistic


@dataclass(frozen=True)
class Stopped:
    """Seconds by the clock and of CPU time, iterations, and what `loss` said of the last."""

    clock: float
    cpu: float
    iterations: int
    loss: float


class _Reached(Exception):
    pass


def fit_until(
    model: LogisticRegression,
    x: Any,
    y_n: np.ndarray,
    loss: Callable[[np.ndarray, np.ndarray], float],
    enough: float,
) -> Stopped:
    """Fit until loss(W_dc, b_c) is no more than `enough`. The model keeps where it ended."""
    minimize, n_classes = _logistic.optimize.minimize, len(np.unique(y_n))
    spent, last, count = [0.0, 0.0], [np.inf], [0]

    def watched(*args: Any, **kwargs: Any) -> Any:
        def callback(w: np.ndarray) -> None:
            clock, cpu = time.perf_counter(), time.process_time()
            W_cd1 = w.reshape(n_classes, -1, order="F")
            last[0] = loss(W_cd1[:, :-1].T, W_cd1[:, -1])
            count[0] += 1
            if last[0] <= enough:
                model.coef_, model.intercept_ = W_cd1[:, :-1].copy(), W_cd1[:, -1].copy()
            spent[0] += time.perf_counter() - clock
            spent[1] += time.process_time() - cpu
            if last[0] <= enough:
                raise _Reached

        return minimize(*args, **{**kwargs, "callback": callback})

    model.set_params(tol=1e-12)
    clock, cpu = time.perf_counter(), time.process_time()
    with patch.object(_logistic.optimize, "minimize", watched):
        try:
            model.fit(x, y_n)
        except _Reached:
            model.classes_ = np.unique(y_n)
    clock, cpu = time.perf_counter() - clock - spent[0], time.process_time() - cpu - spent[1]
    return Stopped(clock, cpu, count[0], last[0])
