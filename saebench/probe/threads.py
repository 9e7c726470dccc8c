"""How many threads a fit is worth: in small products, threads wait longer than they work.

On two cores, rows of 4,096 images, 64 features and 48 classes are fitted twice as fast on one
thread when the machine is idle, and several times as fast when it is not (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from saebench.probe.rows import Rows

SMALL = 2**28  # n d c, the multiplications of one product


@contextmanager
def worthwhile_threads(rows: Rows, n_classes: int) -> Iterator[None]:
    """One thread for a small fit on the CPU, all there are for a large one."""
    before = torch.get_num_threads()
    small = rows.device.type == "cpu" and rows.n * rows.d * n_classes <= SMALL
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
