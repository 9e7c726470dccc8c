"""What of a backbone's output can change at all with some tokens of a site.

Patches at the last block of a model that reads CLS alone cannot: replacing them there measures
nothing. Found by trying, so that it holds for every architecture: noise of the size of the
activations is added to those tokens of an image, and the outputs are compared bit for bit. What
cannot reach the output leaves its arithmetic alone, and so its last bit. The embedding and what a
linear head reads (`HeadSpec.features`) are two answers: a head that reads the mean of the patches
does not see a CLS token that is the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from saebench.errors import UsageError

if TYPE_CHECKING:
    from saebench.backbones.backbone import Backbone

Reads = Literal["any", "embedding", "features"]
"""What is read of an output: its embedding, what a linear head reads of it, any of both."""


def influences(backbone: Backbone, site: str, kinds: Sequence[str]) -> frozenset[str]:
    """Which of `embedding` and `features`, what a linear head reads, can change with these tokens.

    Both passes begin at the site, with the activations of one image of noise.
    Errors: NotFound; UsageError (the site has no such tokens).
    """
    size = backbone.spec.input.size
    generator = torch.Generator().manual_seed(0)
    image_b3hw = torch.rand(1, 3, size, size, generator=generator)
    capture = backbone.acts(image_b3hw, [site])[site]
    layout = backbone.spec.sites[site].kinds
    if unknown := [kind for kind in kinds if kind not in layout]:
        raise UsageError(
            f"the site '{site}' of '{backbone.spec.name}' has no {unknown[0]}",
            f"it has {', '.join(layout)}",
        )
    own_btd = capture.acts_btd
    # In float32, where the sum of squares of half-precision values does not overflow.
    spread = 1 + own_btd.float().std(correction=0)
    noise_btd = torch.randn(own_btd.shape, generator=generator).to(own_btd.device) * spread
    changed_btd = own_btd.clone()
    for kind in kinds:
        changed_btd[:, layout[kind]] += noise_btd[:, layout[kind]].to(own_btd.dtype)
    clean = backbone.resume(site, own_btd, capture.state)
    other = backbone.resume(site, changed_btd, capture.state)
    pairs = {
        "embedding": (clean.embedding_bd, other.embedding_bd),
        "features": (clean.read_bd, other.read_bd),
    }
    return frozenset(name for name, pair in pairs.items() if not torch.equal(*pair))
