"""Image-text retrieval inside fixed blocks of images: the contrastive loss of CLIP.

Block i holds the images at positions 128 i … 128 i + 127 of the evaluation order, whatever the
batches. Of a pair in a block of m pairs, with logits L = scale · cos(image, caption) [m m]:

    loss = (CE(L, row → own caption) + CE(Lᵀ, caption → own image)) / 2      Radford et al. (2021)

Only the images are spliced; the captions' embeddings are the model's own. Images that do not decode
are absent, with their captions. A last block that the evaluation breaks off is left out: among
fewer pairs a loss is smaller. SigLIP's bias cancels in the softmax, as in `saebench.zero_shot`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saebench.data.captions import captions_sha256, evaluated_captions
from saebench.errors import DataError
from saebench.readouts import unit_norm
from saebench.text_embeddings import CHUNK, embedded, text_identity

if TYPE_CHECKING:
    from saebench.backbones import Backbone
    from saebench.data import Dataset
    from saebench.store import Store
    from saebench.units import Source

BLOCK = 128  # images; divides a segment, so that a block never lies in two
KIND = "caption_embeddings"  # of artifact


@dataclass(frozen=True, eq=False)
class Captions:
    """text_nd: [n d] of unit norm, the caption of the image at each place of the order.

    float32 on the CPU, as it lies in the store; a block of it at a time is computed with in float64
    where the images are.
    """

    text_nd: Tensor
    scale: float
    columns: Mapping[str, str] = field(
        default_factory=lambda: {
            "loss": "retrieval_ce",
            "head": "zero_shot",
            "temperature": "model",
        }
    )
    variant: Mapping[str, str] = field(default_factory=lambda: {"loss": "retrieval_ce"})

    def pairs(self, embedding_md: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of the m images of one block: each pair's loss [m] float64, and whether the image's own
        caption is the nearest of the block [m] bool.

        It is where no other caption is as near, unless it is the same text.
        """
        own_md = self.text_nd[torch.tensor(list(places), device=self.text_nd.device)]
        text_md = unit_norm(own_md.to(embedding_md.device))
        logits_mm = self.scale * (unit_norm(embedding_md) @ text_md.T)
        own_m = logits_mm.diagonal()
        to_captions_m = logits_mm.logsumexp(dim=1) - own_m
        to_images_m = logits_mm.logsumexp(dim=0) - own_m
        _, which_m = own_md.unique(dim=0, return_inverse=True)
        same_mm = (which_m[:, None] == which_m[None]).to(logits_mm.device)
        others_m = logits_mm.masked_fill(same_mm, -torch.inf).amax(dim=1)
        return (to_captions_m + to_images_m) / 2, own_m > others_m


def captions_of(backbone: Backbone, dataset: Dataset, source: Source, store: Store) -> Captions:
    """The captions of the evaluation images, embedded; from the store where they are.

    Equal captions are embedded once. Errors: DataError (a caption that is missing),
    NonFiniteError.
    """
    captions = evaluated_captions(dataset, source.spec.test, source.n_images)
    if not captions:
        raise DataError(
            f"the dataset '{dataset.spec.name}' has no captions",
            "say in its entry where they are:  caption = …  in [folder], [tar] or [hub]",
        )
    fields = {
        **text_identity(backbone),
        "n_captions": len(captions),
        "captions": captions_sha256(captions),
    }
    artifact = store.get(KIND, fields, lambda: _embedded(backbone, captions))
    text_ud, which_n = (torch.tensor(artifact.arrays[name]) for name in ("text_ud", "which_n"))
    return Captions(text_ud[which_n], backbone.logit_scale)


def _embedded(backbone: Backbone, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """text_ud: [u d] float32, the u different captions; which_n: [n] int64, that of each image."""
    place: dict[str, int] = {}
    which = [place.setdefault(caption, len(place)) for caption in captions]
    different = list(place)
    chunks = (different[first : first + CHUNK] for first in range(0, len(different), CHUNK))
    text_ud = np.concatenate(list(embedded(backbone, chunks, len(different))))
    return {"text_ud": text_ud, "which_n": np.array(which, dtype=np.int64)}


class Block(NamedTuple):
    """The m images of one block: their places, their embeddings in each pass, their weights."""

    places: list[int]
    embeddings: dict[str, Tensor]  # pass -> [m d]
    weights_mr: Tensor  # [m 500] of the bootstrap


class Blocks:
    """Gathers whole blocks of images out of batches of any size.

    A block is whole once its last place is seen, or a place of a later block, or the segment ends;
    images that did not decode are not in it. left_out: images of a block that the evaluation breaks
    off.
    """

    def __init__(self) -> None:
        self.left_out = 0
        self._number = -1  # of the block that is gathered
        self._parts: list[Block] = []

    def add(self, first: int, embeddings: Mapping[str, Tensor], weights_br: Tensor) -> list[Block]:
        """The blocks that become whole with the b images at places `first` ….

        embeddings: pass -> [b d], the same passes in every batch.
        """
        finished, n, start = [], len(weights_br), 0
        while start < n:
            number, within = divmod(first + start, BLOCK)
            stop = min(n, start + BLOCK - within)
            if number != self._number:
                finished += self._close()
                self._number = number
            part = slice(start, stop)
            self._parts.append(
                Block(
                    list(range(first + start, first + stop)),
                    {name: embedding_bd[part] for name, embedding_bd in embeddings.items()},
                    weights_br[part],
                )
            )
            if (first + stop) % BLOCK == 0:
                finished += self._close()
            start = stop
        return finished

    def flush(self, n_images: int) -> list[Block]:
        """The block that is left at the end of a segment, if the evaluation has all its places.

        n_images: of the whole evaluation.
        """
        if self._parts and (self._number + 1) * BLOCK > n_images:
            self.left_out += sum(len(part.places) for part in self._parts)
            self._parts = []
        return self._close()

    def _close(self) -> list[Block]:
        """The block that was gathered, as one; none where there is none."""
        parts, self._parts = self._parts, []
        if not parts:
            return []
        return [
            Block(
                [place for part in parts for place in part.places],
                {
                    name: torch.cat([part.embeddings[name] for part in parts])
                    for name in parts[0].embeddings
                },
                torch.cat([part.weights_mr for part in parts]),
            )
        ]
