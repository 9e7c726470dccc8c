"""Linear probes: logistic regression at its optimum, over rows in memory, in files, and sparse.

`rows` is what a solver reads, `logistic` the fit for one penalty, `path` the choice of it.
"""

from saebench.probe.logistic import solve
from saebench.probe.path import PENALTIES, Probe, fit_probe
from saebench.probe.rows import Block, DenseRows, Rows
from saebench.probe.solution import Solution, scores

__all__ = [
    "PENALTIES",
    "Block",
    "DenseRows",
    "Probe",
    "Rows",
    "Solution",
    "fit_probe",
    "scores",
    "solve",
]
