"""The training loop: several SAEs, one stream of rows, no backbone in sight.

    fitted = fit(recipes, Stream(Rows(x_nd), 512, memory=2**30), device=torch.device("cpu"))

Every step draws one batch, which all SAEs see. At the end each is scaled back to raw activations,
gets its stored threshold where it needs one, and is measured on a sample of the training rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saebench.errors import NonFiniteError, UsageError
from saebench.saes import Sae
from saebench.train.checkpoint import Checkpoint, key_of
from saebench.train.convert import from_sae, to_sae
from saebench.train.recipe import THRESHOLDED, Recipe
from saebench.train.scaling import Scaling, geometric_median, measure_scaling
from saebench.train.stream import Stream
from saebench.train.trainee import Trainee, batch_threshold

SAMPLE_ROWS = 65_536  # training rows for the scaling, thresholds and the final measurement
MEDIAN_ROWS = 8_192
TOLERANCE = 0.1  # relative, of the measured L0 against its target


@dataclass(frozen=True)
class Measured:
    """An SAE on a sample of its training rows: what the entry reports."""

    l0: float
    fvu: float
    dead: int  # latents that never fire on the sample
    n_rows: int

    def reached(self, target: float) -> bool:
        """Whether the L0 is within `TOLERANCE` of the target."""
        return abs(self.l0 - target) <= TOLERANCE * target


@dataclass(frozen=True)
class Fitted:
    """A finished SAE, for raw activations."""

    recipe: Recipe
    sae: Sae


Watch = Callable[[int, Sequence[Trainee]], None]
"""Called after each step with the number of steps done and the SAEs in training."""
OnDivergence = Callable[[Recipe, str], None]
"""Called with each SAE that is given up, and why."""


def fit(
    recipes: Sequence[Recipe],
    stream: Stream,
    *,
    device: torch.device,
    start: Sae | None = None,
    checkpoint: Checkpoint | None = None,
    watch: Watch | None = None,
    on_divergence: OnDivergence = lambda recipe, why: None,
) -> list[Fitted]:
    """Train one SAE for each recipe on the same rows; `start` replaces their random starts.

    With a checkpoint it goes on where that one stands, on the CPU bit for bit as if it had never
    been interrupted; its last one, at the last step, stays. An SAE that diverges is given up and
    missing from the result. Errors: NonFiniteError when all do, UsageError for recipes of
    different lengths.
    """
    steps = _same(recipes, "steps")
    if _same(recipes, "batch_rows") != stream.batch_rows:
        raise UsageError(f"the recipes' batches are not the stream's, {stream.batch_rows} rows")
    saved = _load(checkpoint, recipes) if checkpoint else None
    if saved:
        scaling = Scaling(saved["mean_d"].to(device), saved["scale"])
    else:
        scaling = measure_scaling(x_nd.to(device) for x_nd in stream.sample(SAMPLE_ROWS))
    diverged: dict[str, str] = saved["diverged"] if saved else {}
    for recipe in recipes:
        if key_of(recipe) in diverged:
            on_divergence(recipe, diverged[key_of(recipe)])
    left = [recipe for recipe in recipes if key_of(recipe) not in diverged]
    trainees = _trainees(left, stream, scaling, device, start)
    if saved:
        for trainee in trainees:
            trainee.restore(saved["trainees"][key_of(trainee.recipe)])

    def survivors(act: Callable[[Trainee], None]) -> list[Trainee]:
        """The trainees on which `act` finds nothing but finite numbers."""
        kept = []
        for trainee in trainees:
            try:
                act(trainee)
            except NonFiniteError as error:
                diverged[key_of(trainee.recipe)] = str(error)
                on_divergence(trainee.recipe, str(error))
            else:
                kept.append(trainee)
        return kept

    done = saved["step"] if saved else 0
    last_saved = time.monotonic()
    for step in range(done, steps):
        if not trainees:
            break
        x_nd = scaling(stream.batch(step).to(device))
        trainees = survivors(lambda trainee, x_nd=x_nd: trainee.step(x_nd))
        last = step + 1 == steps
        if last:
            trainees = survivors(Trainee.check)
        if watch and trainees:
            watch(step + 1, trainees)
        waited = time.monotonic() - last_saved
        if checkpoint and trainees and (last or waited >= checkpoint.every_seconds):
            checkpoint.save(_state(step + 1, scaling, trainees, diverged))
            last_saved = time.monotonic()
    if not trainees:
        if checkpoint:
            checkpoint.remove()
        raise NonFiniteError("\n".join(diverged[key_of(recipe)] for recipe in recipes))
    return [_finish(trainee, stream, scaling, device) for trainee in trainees]


def _load(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> dict[str, Any] | None:
    """The saved state, unless it lacks one of the SAEs: then all begin anew."""
    saved = checkpoint.load()
    if saved and {key_of(recipe) for recipe in recipes} <= {*saved["trainees"], *saved["diverged"]}:
        return saved
    return None


def _same(recipes: Sequence[Recipe], name: str) -> int:
    values = {getattr(recipe, name) for recipe in recipes}
    if len(values) != 1:
        raise UsageError(f"SAEs trained in one pass need the same {name}, got {sorted(values)}")
    return values.pop()


def _trainees(
    recipes: Sequence[Recipe],
    stream: Stream,
    scaling: Scaling,
    device: torch.device,
    start: Sae | None,
) -> list[Trainee]:
    b_dec_d = None
    if start is None and any(recipe.b_dec == "geometric-median" for recipe in recipes):
        rows_nd = torch.cat(list(stream.sample(MEDIAN_ROWS))).to(device)
        b_dec_d = geometric_median(scaling(rows_nd))
    return [
        Trainee(
            recipe,
            stream.source.d_model,
            device=device,
            weights=scaling.unfold(from_sae(start.to(device))) if start else None,
            b_dec_d=b_dec_d if recipe.b_dec == "geometric-median" else None,
        )
        for recipe in recipes
    ]


def _state(
    step: int, scaling: Scaling, trainees: Sequence[Trainee], diverged: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "step": step,
        "mean_d": scaling.mean_d,
        "scale": scaling.scale,
        "trainees": {key_of(trainee.recipe): trainee.state() for trainee in trainees},
        "diverged": dict(diverged),
    }


def _finish(trainee: Trainee, stream: Stream, scaling: Scaling, device: torch.device) -> Fitted:
    weights: Mapping[str, Tensor] = trainee.weights()
    if trainee.recipe.arch in THRESHOLDED:
        tiles = [scaling(x_nd.to(device)) for x_nd in stream.sample(SAMPLE_ROWS)]
        theta = batch_threshold(dict(weights), tiles, trainee.recipe.target)
        weights = {**weights, "threshold_s": torch.full_like(weights["b_enc_s"], theta)}
    return Fitted(trainee.recipe, to_sae(trainee.recipe, scaling.fold(dict(weights))))


@torch.no_grad()
def measure(sae: Sae, stream: Stream, device: torch.device) -> Measured:
    """L0, fvu and dead latents on the sample, in float64 sums, through the SAE as it is saved."""
    mean_d = torch.cat([x_nd.double() for x_nd in stream.sample(SAMPLE_ROWS)]).mean(0).to(device)
    n = active = 0
    error = total = 0.0
    fired_s = torch.zeros(sae.d_sae, dtype=torch.bool, device=device)
    for tile in stream.sample(SAMPLE_ROWS):
        x_nd = tile.to(device)
        codes = sae.encode(x_nd)
        recon_nd = sae.decode(codes)
        n += len(x_nd)
        active += int(codes.l0_n().sum())
        fired_s[codes.nonzero()[1]] = True
        error += float((x_nd.double() - recon_nd.double()).square().sum())
        total += float((x_nd.double() - mean_d).square().sum())
    return Measured(active / n, error / total, int((~fired_s).sum()), n)
