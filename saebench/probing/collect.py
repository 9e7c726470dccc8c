"""One pass over train images for all SAEs of a wave: what probes are fitted on, in the store.

    x      [n f]  features of the untouched activations, once for all SAEs on the same tokens
    xhat   [n f]  the same of the reconstructions
    codes  [n s]  sparse, pooled over tokens in each way of the feature

The images of a sample are cut into chunks of 32,768. Each chunk has tables of its own, which are
there whole or not at all: a run that was killed measures the other chunks alone, and one of more
images goes on from those. Memory does not grow with the images.

Where images that do not decode are left out, a chunk's tables are others, and are made anew in
every run: only a pass tells which images still do not decode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from saebench.backbones import Backbone
from saebench.data import Dataset
from saebench.loading import Loaded
from saebench.probe_features import Feature
from saebench.probing.chunks import Collecting
from saebench.probing.collected import Asked, Collected
from saebench.probing.jobs import Keys, What
from saebench.probing.sample import Sample
from saebench.probing.tables import Tables
from saebench.saes import Coder
from saebench.store import Store
from saebench.tiles import Tiles
from saebench.together import Together
from saebench.units import Source, Unit


@dataclass(eq=False)
class Collector:
    """Collects of one backbone on one dataset's train split. Of each unit one feature at a time."""

    backbone: Backbone
    dataset: Dataset
    source: Source
    store: Store
    dtype: str
    tiles: Tiles
    workers: int = 0
    bad_images: Literal["fail", "skip"] = "fail"
    on_pass: Callable[[int], None] = lambda n_images: None
    on_images: Callable[[int], None] = lambda n: None
    on_bad: Callable[[str, int, str], None] = lambda split, row, why: None
    say: Callable[[str], None] = lambda text: None
    left_out: dict[str, tuple[str, ...]] = field(default_factory=dict)  # chunk -> ids, once known

    def __post_init__(self) -> None:
        self.keys = Keys(self.backbone, self.source, self.dtype)
        self.tables = Tables(self.store)

    def key(
        self, unit: Unit, feature: Feature, what: What, sample: Sample, coder: Coder | Together
    ) -> dict[str, Any]:
        """Everything that can change what is collected; of codes whatever their pooling.

        With batches of the size that comes next: where memory then runs out, `Collected.batch`
        has the size that it was.
        """
        images = {"images": sample.key["images"], "batch": self.tiles.batch_size}
        return self.keys.fields(unit, feature, what, coder=coder) | images

    def collect(self, asked: Sequence[Asked], sample: Sample, loaded: Loaded) -> Collected:
        """Measure what is not in the store yet, in one pass over the images.

        An error of one SAE is its own, and the others go on. Errors: DataError (an image that does
        not decode, or none that does), WriteError (neither the store nor memory has room).
        """
        return Collecting(self, asked, sample, loaded).run()
