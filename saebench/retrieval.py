"""Image-text retrieval inside fixed blocks of images: the contrastive loss of CLIP.

Block i holds the images at positions 128 i … 128 i + 127 of the evaluation order, whatever the
batches. Of a pair in a block of m pairs, with logits L = scale · cos(image, caption) [m m]:

    loss = (CE(L, row → own caption) + CE(Lᵀ, caption → own image)) / 2      Radford et al. (2021)

Only the images are spliced; the captions' embeddings are the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from saebench.backbones import Backbone
    from saebench.data import Dataset
    from saebench.store import Store
    from saebench.units import Source

BLOCK = 128  # images; divides a segment, so that a block never lies in two


@dataclass(frozen=True, eq=False)
class Captions:
    """text_nd: [n d] float64 of unit norm, the caption of the image at each place of the order."""

    text_nd: Tensor
    scale: float
    columns: Mapping[str, str] = field(
        default_factory=lambda: {"loss": "retrieval_ce", "temperature": "model"}
    )
    variant: Mapping[str, str] = field(default_factory=lambda: {"loss": "retrieval_ce"})

    def pairs(self, embedding_md: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of the m images of one block: each pair's loss [m] float64, and whether the image's own
        caption is the nearest of the block [m] bool."""
        raise NotImplementedError


def captions_of(backbone: Backbone, dataset: Dataset, source: Source, store: Store) -> Captions:
    """The captions of the evaluation images, embedded; from the store where they are."""
    raise NotImplementedError
