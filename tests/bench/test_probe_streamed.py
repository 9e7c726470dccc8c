"""What does a linear probe of features in files cost: for each row, and for all of ImageNet?

    pytest tests/bench/test_probe_streamed.py -m bench -n 0 -s

Seconds for one evaluation of the loss and its gradient, over 40,000 to 320,000 rows of width 768 in
files, beside the same rows in memory; how many evaluations the path takes; and from both what
1.28 million rows of 1,000 classes would take. docs/performance.md has results.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from saebench.probe import DenseRows, Rows, fit_probe, solve
from saebench.probe.mapped import MappedRows
from saebench.tensors import memory_map, to_bytes

pytestmark = pytest.mark.bench

D, PART, PARTS, ROUNDS = 768, 40_000, 8, 3
IMAGENET, HELD = 1_281_167, 5  # rows; of so many, one is held back


class Files:
    """Anisotropic features with a common mean, of `c` classes, in files of 123 MB."""

    def __init__(self, folder: Path) -> None:
        self.parts: list[np.ndarray] = []
        rng = np.random.default_rng(0)
        spectrum_d = np.geomspace(3, 0.03, D).astype(np.float32)
        mean_d = 5 * rng.normal(size=D).astype(np.float32)
        axes_dd = np.linalg.qr(rng.normal(size=(D, D)))[0].astype(np.float32)
        centres_cd = rng.normal(size=(1000, D)).astype(np.float32)
        self.y_n = rng.integers(0, 1000, PART * PARTS)
        for i in range(PARTS):
            y_m = self.y_n[i * PART : (i + 1) * PART]
            x_md = rng.standard_normal((PART, D), dtype=np.float32) + 0.3 * centres_cd[y_m]
            x_md = (x_md * spectrum_d) @ axes_dd + mean_d
            path = folder / f"{i}.safetensors"
            path.write_bytes(to_bytes({"x": x_md}))
            self.parts.append(memory_map(path)["x"])

    def rows(self, n_parts: int, c: int) -> MappedRows:
        return MappedRows.of(self.parts[:n_parts], self.y_n[: n_parts * PART] % c)

    def in_memory(self, c: int) -> DenseRows:
        x_nd = torch.from_numpy(np.array(self.parts[0]))
        return DenseRows.of(x_nd, torch.from_numpy(self.y_n[:PART] % c))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    folder = tmp_path_factory.mktemp("features")
    yield Files(folder)
    for path in folder.iterdir():
        path.unlink()


def cost(rows: Rows, c: int) -> tuple[float, float]:
    """Microseconds for one row and one evaluation, by the clock and of processor time."""
    clock, cpu = time.perf_counter(), time.process_time()
    found = solve(rows, c, 0.1, tolerance=0.01)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return (1e6 * clock / found.evaluations / rows.n, 1e6 * cpu / found.evaluations / rows.n)


@pytest.mark.parametrize(("c", "sizes"), [(100, (1, 2, 4, 8)), (1000, (1, 2, 4))])
def test_cost_of_a_row(files: Files, c: int, sizes: tuple[int, ...]) -> None:
    """The same however many there are, and as it is in memory."""
    settings: dict[str, Rows] = {f"{n * PART:,}": files.rows(n, c) for n in sizes}
    settings["in memory"] = files.in_memory(c)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    for _ in range(ROUNDS):
        for name, rows in settings.items():
            seen[name].append(cost(rows, c))
    print(f"\n{c} classes, {torch.get_num_threads()} threads, µs a row and evaluation")
    for name, pairs in seen.items():
        clock, cpu = (median(pair[i] for pair in pairs) for i in range(2))
        print(f"{name:>10}: clock {clock:.2f}, CPU time {cpu:.2f}")


def test_all_of_imagenet(files: Files) -> None:
    """The path on 40,000 rows of 1,000 classes: its evaluations, and the seconds of each."""
    rows = files.rows(1, 1000)
    held_n = torch.arange(rows.n) % HELD == HELD - 1
    clock, cpu = time.perf_counter(), time.process_time()
    probe = fit_probe(rows, held_n, 1000)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    hours = cpu * IMAGENET / rows.n / 3600
    print(
        f"\n{rows.n:,} rows, 1,000 classes: {probe.evaluations} evaluations, λ {probe.penalty:g}, "
        f"accuracy {probe.accuracy_validation:.2f}, {clock:.0f} s by the clock, {cpu:.0f} s of "
        f"CPU time; {IMAGENET:,} rows {hours:.1f} h of CPU time"
    )
    assert probe.converged
