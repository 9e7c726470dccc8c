"""The training loop all recipes share: AdamW, warm-up, cosine decay, shuffled epochs.

Matrices are decayed, vectors (norms, biases, tokens) are not. The learning rate rises linearly for
the first 5 % of the steps and falls to zero along half a cosine. The averaged weights (exponential
moving average, which starts as a plain average) are what a recipe stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import nn
from torch.optim.swa_utils import AveragedModel

WARM_UP = 0.05


@dataclass(frozen=True)
class Schedule:
    """`rate` is the peak learning rate; `memory` the EMA's decay per step."""

    epochs: int
    batch_size: int = 64
    rate: float = 2e-3
    weight_decay: float = 0.05
    memory: float = 0.995


def optimise(
    model: nn.Module,
    n_images: int,
    loss: Callable[[torch.Tensor, float], torch.Tensor],
    schedule: Schedule,
    generator: torch.Generator,
    after: Callable[[float], None] | None = None,
) -> nn.Module:
    """Minimise `loss(rows_b, progress)` over all parameters; return the averaged model.

    rows_b: the images of a step; progress: 0 at the first step, 1 at the last. `after(progress)` is
    called after every step. The last, smaller batch of an epoch is left out.
    """
    groups = [
        {
            "params": [p for p in model.parameters() if p.ndim >= 2],
            "weight_decay": schedule.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98))
    averaged = AveragedModel(model, avg_fn=_average(schedule.memory), use_buffers=True)
    steps = schedule.epochs * (n_images // schedule.batch_size)
    model.train()
    step = 0
    for _ in track(range(schedule.epochs), description="epochs"):
        order = torch.randperm(n_images, generator=generator)
        for rows_b in order.split(schedule.batch_size)[: n_images // schedule.batch_size]:
            progress = step / max(1, steps - 1)
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate * learning_rate(progress)
            value = loss(rows_b, progress)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            averaged.update_parameters(model)
            if after:
                after(progress)
            step += 1
    return averaged.module.eval()


def learning_rate(progress: float) -> float:
    """The fraction of the peak rate at `progress` 0..1."""
    rise = min(1.0, (progress + 1e-3) / WARM_UP)
    return rise * 0.5 * (1 + math.cos(math.pi * progress))


def _average(memory: float) -> Callable[..., torch.Tensor]:
    def average(mean: torch.Tensor, new: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        if not mean.is_floating_point():
            return new
        keep = min(memory, float(count) / (float(count) + 1))
        return keep * mean + (1 - keep) * new

    return average
