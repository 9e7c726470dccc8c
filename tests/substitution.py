"""A small stand-in of a backbone behind a site, for tests of `loss_substitution`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.backbones import Output
from saebench.controls import Identity
from saebench.readouts import OwnHead, ZeroShot
from saebench.task import Measurement
from tests.measure import measure

D, T, C, N = 12, 5, 8, 40
KINDS = {"cls": slice(0, 1), "patches": slice(1, T)}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = drawn(N, T, D, seed=1) + 0.5
MEAN = X.mean(0)
LABELS = np.random.default_rng(0).integers(0, C, N)
W_DC = drawn(D, C, seed=2)


def rest(x_btd: Tensor) -> Output:
    """What comes after the site: a mean over tokens, and a head."""
    embedding_bd = torch.tanh(x_btd.mean(dim=1))
    return Output(embedding_bd, embedding_bd @ W_DC * 2)


def reads_cls(x_btd: Tensor) -> Output:
    return Output(x_btd[:, 0].clone(), x_btd[:, 0] @ W_DC)


def how(**more: Any) -> dict[str, Any]:
    """A context and batches of the stand-in."""
    batches = {"rest": more.pop("rest", rest), "mean_td": MEAN, **more.pop("batches", {})}
    given = {"labels": LABELS, "kinds": KINDS, "readouts": [OwnHead(slice(0, C))]}
    return {**given, "batches": batches, **more}


def rows_of(coder: Any, x_btd: Tensor = X, **more: Any) -> dict[tuple[str, str], Measurement]:
    """(metric, variant) -> row."""
    found = measure("loss_substitution", x_btd, coder, **how(**more))
    return {(metric, variant): row for (metric, _, variant), row in found.items()}


HEADS = [
    ZeroShot(W_DC.T.double(), 20.0, {"loss": "zero_shot_ce", "temperature": "model"}),
    ZeroShot(
        W_DC.T.double(),
        1.0,
        {"loss": "zero_shot_ce", "temperature": "1"},
        {"temperature": "1"},
    ),
]


class Moved(Identity):
    """A coder whose reconstruction is a function of x."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__(D)
        object.__setattr__(self, "move", move)

    def decode(self, codes: Any) -> Tensor:
        return self.move(codes.dense())  # type: ignore[attr-defined]
