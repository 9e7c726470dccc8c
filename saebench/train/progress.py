"""`saebench train` as a person sees it: two bars, then what was trained and how good it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from saebench import paths
from saebench.bad_images import NAMED
from saebench.bars import stepping_aside
from saebench.train.config import TrainConfig
from saebench.train.fit import TOLERANCE
from saebench.train.run import TrainedSae, Watch, train
from saebench.train.trainee import Trainee

EVERY = 20  # steps between two updates of the bar


class ProgressWatch(Watch):
    """A bar for the images that go through the backbone, and one for the steps."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bad: set[str] = set()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def begin(self, names: Sequence[str], steps: int, n_images: int | None) -> None:
        self._images = self.bar.add_task("activations", total=n_images, now="")
        self._steps = self.bar.add_task("steps", total=steps, now="")
        self.console.print(f"training {', '.join(names)}", markup=False)

    def images(self, n: int) -> None:
        self.bar.advance(self._images, n)

    def bad_image(self, why: str) -> None:
        if why not in self.bad and len(self.bad) < NAMED:
            self.console.print(f"left out: {why}", markup=False, soft_wrap=True)
        self.bad.add(why)

    def step(self, done: int, trainees: Sequence[Trainee]) -> None:
        if done % EVERY == 0 or done == trainees[0].recipe.steps:
            losses = sorted(trainee.loss for trainee in trainees)
            now = f"loss {losses[0]:.3f}" + (f" … {losses[-1]:.3f}" if len(losses) > 1 else "")
            self.bar.update(self._steps, completed=done, now=now)


def train_with_progress(config: TrainConfig, console: Console) -> int:
    """Train, print the table, and return the exit status."""
    watch = ProgressWatch(console)
    try:
        with watch.bar, stepping_aside(watch.bar):
            found = train(config, watch)
    except KeyboardInterrupt:
        console.print(
            "\ninterrupted: the same command goes on from the last checkpoint", markup=False
        )
        return 130
    _print(found, config, console)
    if watch.bad:
        console.print(f"{len(watch.bad)} images did not decode and were left out", style="yellow")
    return 1 if any(sae.diverged for sae in found) else 0


def _print(found: Sequence[TrainedSae], config: TrainConfig, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("SAE", "L0", "fvu ↓", "dead ↓", "s"):
        table.add_column(name, justify="left" if name == "SAE" else "right")
    for sae in found:
        if sae.measured is None:
            table.add_row(sae.name, "", "", "", "diverged" if sae.diverged else "there already")
            continue
        share = sae.measured.dead / sae.recipe.d_sae
        table.add_row(
            sae.name,
            f"{sae.measured.l0:.2f}",
            f"{sae.measured.fvu:.4f}",
            f"{share:.1%}",
            f"{sae.seconds:.0f}",
        )
    console.print(table)
    for sae in found:
        if sae.diverged:
            console.print(f"{sae.name}: {sae.diverged}", style="red", markup=False)
        if sae.measured and not sae.measured.reached(sae.recipe.target):
            console.print(
                f"{sae.name}: L0 {sae.measured.l0:.2f} is more than {TOLERANCE:.0%} from its "
                f"target {sae.recipe.target:g}; give it more --steps",
                style="yellow",
                markup=False,
            )
    trained = [sae for sae in found if sae.measured]
    if trained:
        console.print("measured on a sample of the training rows; next:", style="dim")
        elsewhere = Path(config.out).resolve() != paths.CONTENT
        option = f"--registry {config.out} " if elsewhere else ""
        console.print(f"  saebench run {option}--sae {trained[0].name}", markup=False)
