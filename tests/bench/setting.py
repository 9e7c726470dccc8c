"""What the benchmarks measure: SAEs of ViT-B/16 size, all three streaming tasks, bare products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from saebench.activations import TopK
from saebench.saes import Sae
from saebench.task import Context, Task
from tests.measure import LocalBatch, context, task_class

D, S, K = 768, 16_384, 32
KINDS = {"cls": slice(0, 1), "patches": slice(1, 197)}
TOKENS, IMAGES = 197, 42  # 8,274 rows
TASKS = ("reconstruction", "sparsity", "dead_neurons")


def make_sae(seed: int = 0) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    rows_sd = normalize(torch.randn(S, D, generator=generator), dim=1)
    b_dec_d = 0.1 * torch.randn(D, generator=generator)
    return Sae(
        W_enc_ds=rows_sd.T.contiguous(),
        b_enc_s=torch.zeros(S),
        W_dec_sd=rows_sd,
        b_dec_d=b_dec_d,
        activation=TopK(K),
        architecture="topk",
        b_pre_d=b_dec_d,
    )


def activations(images: int = IMAGES) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, TOKENS, D, generator=generator) + 0.5


def started(ctx: Context) -> list[Task]:
    tasks = [task_class(name)() for name in TASKS]
    for task in tasks:
        task.start(ctx)
    return tasks


def measure_all(x_btd: Tensor, saes: list[Sae], tasks: list[list[Task]], first: int = 0) -> None:
    """One batch through every SAE and all its tasks, what depends on x alone computed once."""
    ids = [f"image{first + i}" for i in range(len(x_btd))]
    labels_b = np.arange(first, first + len(x_btd)) % 10
    memo: dict = {}
    for sae, its_tasks in zip(saes, tasks, strict=True):
        batch = LocalBatch(ids, first, KINDS, sae, x_btd, labels_b, memo)
        for task in its_tasks:
            task.update(batch)


def evaluation(x_btd: Tensor, saes: list[Sae]) -> Callable[[], list[list[Task]]]:
    """All streaming metrics, with intervals and the latents table, from fresh tasks."""

    def run() -> list[list[Task]]:
        ctx = context(x_btd, saes[0], kinds=KINDS, class_names=[str(i) for i in range(10)])
        tasks = [started(ctx) for _ in saes]
        measure_all(x_btd, saes, tasks)
        return tasks

    return run


def best_product(x_btd: Tensor, sae: Sae) -> tuple[str, Callable[[], None]]:
    """The bare float32 encoder product, by the fastest of three kernels and five row tiles."""
    x_nd, W_sd = x_btd.flatten(0, 1), sae.W_dec_sd

    def onednn(tile: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(tile, W_sd, sae.b_enc_s, "none", [], "")

    kernels: dict[str, Callable[[Tensor], Tensor]] = {
        "addmm": lambda tile: torch.addmm(sae.b_enc_s, tile, sae.W_enc_ds),
        "linear": lambda tile: linear(tile, W_sd, sae.b_enc_s),
    }
    if torch.backends.mkldnn.is_available():
        kernels["oneDNN"] = onednn
    found: dict[str, tuple[float, Callable[[], None]]] = {}
    for name, kernel in kernels.items():
        for rows in (128, 256, 512, 1024, 2048):

            def run(kernel: Callable[[Tensor], Tensor] = kernel, rows: int = rows) -> None:
                for tile in x_nd.split(rows):
                    kernel(tile)

            run()
            found[f"{name}, {rows} rows"] = (timed(run)[1], run)
    best = min(found, key=lambda name: found[name][0])
    return best, found[best][1]


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of this process's CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


class Interleaved:
    """Runs some functions in turn, round after round, and keeps the times of each."""

    def __init__(self, **functions: Callable[[], object]) -> None:
        self.functions = functions
        self.seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}

    def round(self) -> None:
        for name, run in self.functions.items():
            self.seconds[name].append(timed(run))

    def medians(self, clock: int) -> dict[str, float]:
        """By the clock (0) or by CPU time (1)."""
        return {
            name: statistics.median(pair[clock] for pair in pairs)
            for name, pairs in self.seconds.items()
        }
