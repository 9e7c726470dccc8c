"""The rows that peers and saebench are compared on, and what it means that they agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from saebench.activations import TopK
from saebench.backbones import load_backbone
from saebench.codes import Codes
from saebench.registry import Registry
from saebench.saes import Sae
from saebench.testing.report import real_images

BACKBONE, SITE, WIDTH = "tiny-vit", "blocks.2", 64
IMAGES = 8
RELATIVE = 1e-5  # of the largest value, float32 on both sides
MOST_TIES = 2  # rows in which the last place of a top k may be a tie, see `ties_n`

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]


@cache
def real_rows() -> Tensor:
    """[n 64] float32, all tokens of real images at a site of an embedded backbone."""
    registry = Registry.load()
    backbone = load_backbone(registry.backbone(BACKBONE))
    _, _, images_b3hw = real_images(backbone, registry, IMAGES)
    acts_btd = backbone.acts(images_b3hw, [SITE])[SITE].acts_btd
    return acts_btd.reshape(-1, WIDTH).float().clone()


def random_rows(n: int = 200, d: int = WIDTH, seed: int = 7) -> Tensor:
    """[n d] float32 with a mean that is clearly not zero."""
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(n, d, generator=generator) + torch.linspace(0.5, 2, d)


def randomised(module: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter of a peer's module values that show mistakes: none zero, none alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


def assert_agree(sae: Sae, peer: Forward, *rows_nd: Tensor) -> None:
    """Codes and reconstruction are the peer's, on random rows and on real activations.

    `peer` gives (codes [n s], reconstruction [n d]) of rows [n 64]; `rows_nd` are the rows, where
    they are others than those. In a few rows of a top k, ties may be decided otherwise: all else of
    them is compared, and the reconstruction with the latents that the peer decided for.
    """
    top = _top_k(sae)
    for x_nd in rows_nd or (random_rows(), real_rows()):
        with torch.no_grad():
            theirs_ns, theirs_nd = peer(x_nd)
        codes = sae.encode(x_nd)
        assert codes.n_nonzero > 0, "nothing is active: nothing was compared"
        ours_ns = codes.dense()
        if top is not None:
            tied_n = ties_n(ours_ns, theirs_ns, by_magnitude=top.by_magnitude)
            assert tied_n.sum() <= MOST_TIES, f"{int(tied_n.sum())} rows keep other latents"
            theirs_here_ns = tied_n[:, None] & ((ours_ns != 0) != (theirs_ns != 0))
            ours_ns = torch.where(theirs_here_ns, theirs_ns, ours_ns)
            codes = Codes.from_dense(ours_ns, codes.frame)
        assert_close(ours_ns, theirs_ns)
        assert_close(sae.decode(codes), theirs_nd)


def _top_k(sae: Sae) -> TopK | None:
    """The top k that decides which latents of a row are kept, if one does."""
    activation = sae.activation
    while hasattr(activation, "inner"):
        activation = activation.inner
    return activation if isinstance(activation, TopK) else None


def ties_n(ours_ns: Tensor, theirs_ns: Tensor, *, by_magnitude: bool = False) -> Tensor:
    """[n] whether a row's last kept place went to another latent of the same value.

    Where the k-th and the next differ by less than float32 resolves, rounding decides between them
    (seen: 7e-9 relative, in float64). Both keep equally many, and all that they do not share is as
    large as the least that is kept; `by_magnitude`, whatever its sign.
    """
    active_ns, theirs_active_ns = ours_ns != 0, theirs_ns != 0
    swapped_ns = active_ns != theirs_active_ns
    as_many_n = active_ns.sum(dim=1) == theirs_active_ns.sum(dim=1)
    kept_ns = torch.where(active_ns, ours_ns, theirs_ns)
    if by_magnitude:
        kept_ns, theirs_ns = kept_ns.abs(), theirs_ns.abs()
    least_n = torch.where(theirs_active_ns, theirs_ns, torch.inf).amin(dim=1)
    alike_ns = (kept_ns - least_n[:, None]).abs() <= RELATIVE * theirs_ns.abs().max()
    return swapped_ns.any(dim=1) & (alike_ns | ~swapped_ns).all(dim=1) & as_many_n


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Both differ by at most 1e-5 of the largest value."""
    assert ours.shape == theirs.shape
    largest = float(theirs.abs().max())
    off = float((ours.double() - theirs.double()).abs().max())
    assert off <= RELATIVE * largest, f"{off:.3g} apart, the largest value is {largest:.3g}"
