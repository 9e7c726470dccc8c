"""The task `reconstruction` against hand-computed vectors, closed forms and a NumPy twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.measure import Fixed, measure

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
