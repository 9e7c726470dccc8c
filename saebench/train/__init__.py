"""Reference SAEs by one recipe on any backbone, so that backbones can be compared fairly.

    trained = train(TrainConfig(backbone="tiny-vit", arch=("topk", "jumprelu"), k=(12, 24)))

trains four SAEs in one pass over the activations, writes each as a safetensors file and a registry
entry, and says what was measured. docs/train.md has the recipe and its reasons. No torch is
imported before something is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.train.config import TrainConfig
from saebench.train.recipe import ARCHITECTURES, Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from saebench.train.run import TrainedSae, Watch

__all__ = ["ARCHITECTURES", "Recipe", "TrainConfig", "train", "train_with_progress"]


def train(config: TrainConfig, watch: Watch | None = None) -> list[TrainedSae]:
    """Train the SAEs of a call and write their entries; see `saebench.train.run.train`."""
    from saebench.train import run

    return run.train(config, watch)


def train_with_progress(config: TrainConfig, console: Console) -> int:
    """The same with a progress bar and a table; returns the exit status."""
    from saebench.train.progress import train_with_progress as shown

    return shown(config, console)
