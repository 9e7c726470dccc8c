"""saebench's own format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from saebench.activations import TopK
from saebench.formats import write_sae
from saebench.inputs import Scaling
from saebench.saes import Sae
from tests.checkpoints import Case, D, S, as64, numbers, relu, rows, top


def _case(s: int) -> Case:
    W_enc, b_enc, W_dec, b_dec = (
        numbers(D, s, seed=2),
        numbers(s, seed=3),
        rows(s),
        numbers(D, seed=4),
    )
    mean = numbers(D, seed=5)

    def write(folder: Path) -> Path:
        sae = Sae(W_enc, b_enc, W_dec, b_dec, TopK(6), "topk", b_dec, Scaling(mean, 0.5))
        write_sae(sae, folder / "sae.safetensors")
        return folder / "sae.safetensors"

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        E, e, D_, b, m = as64(W_enc, b_enc, W_dec, b_dec, mean)
        pre = ((x - m) * 0.5 - b) @ E + e
        z = relu(pre) * top(pre, 6)
        return z, (z @ D_ + b) / 0.5 + m

    return Case(f"saebench/topk-{s}", "saebench", write, forward)


CASES = [_case(S), _case(D)]
