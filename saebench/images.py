"""A batch of images on its way through a run: what all SAEs share.

    Images   one batch through the backbone: captures at every site in use, clean output
    View     the tokens of one site that an SAE covers, x_btd; shared by all SAEs on them

Everything is computed on first use and kept for the batch, so that the backbone runs once for all
SAEs, and a sum over x once for all SAEs that see the same x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saebench.codes import Codes, Frame
from saebench.errors import NonFiniteError
from saebench.finite import all_finite
from saebench.metrics.bootstrap import poisson_weights

if TYPE_CHECKING:
    from saebench.backbones import Backbone, Capture, Output
    from saebench.saes import Coder


@dataclass(frozen=True)
class Images:
    """b images of a dataset at positions `first` … of the evaluation order.

    means: site -> [t d] float32, the train mean of each token's kind, for mean ablation.
    """

    backbone: Backbone
    dataset: str
    ids: Sequence[str]
    labels: np.ndarray
    levels: Mapping[str, np.ndarray]
    first: int
    captures: Mapping[str, Capture]
    means: Mapping[str, torch.Tensor] = field(default_factory=dict)
    _memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def weights_br(self) -> torch.Tensor:
        """[b 500] float64 bootstrap weights, from the ids alone."""
        weights = poisson_weights(self.dataset, self.ids)
        return torch.as_tensor(weights, dtype=torch.float64, device=self.backbone.device)

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """`compute()` once for this batch of images, for everybody."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def forget(self) -> None:
        """Drop what was computed, once nobody asks any more.

        Views are kept here and know their images: left to the garbage collector, which counts
        objects and not bytes, the activations of many batches would stay.
        """
        self._memo.clear()

    def layout(self, site: str) -> Mapping[str, slice]:
        """Token kind -> its slice of the site's tokens."""
        return self.backbone.spec.sites[site].kinds

    def clean_from(self, site: str) -> str:
        """Where the clean pass that stands beside splices at `site` goes on from.

        What the pass left unrun after its last site is the least. Where the last block is run in
        the short way, a clean pass takes the way of its splices: another one rounds otherwise.
        """
        full = self.backbone.last_block == "full"
        return self.backbone.deepest(self.captures) if full else site

    def clean_output(self, site: str) -> Output:
        """Output of the untouched images, beside splices at `site`."""
        start = self.clean_from(site)
        capture = self.captures[start]
        return self.once(
            f"clean from {start}",
            lambda: self.backbone.resume(start, capture.acts_btd, capture.state),
        )

    def view(self, site: str, kinds: Sequence[str]) -> View:
        """The tokens of these kinds at a site, shared by all who ask for the same."""

        def made() -> View:
            layout = self.layout(site)
            acts_btd = self.captures[site].acts_btd
            parts = [acts_btd[:, layout[kind]] for kind in layout if kind in kinds]
            x_btd = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            if len(parts) == len(layout):
                x_btd = acts_btd
            return View(self, site, rebased(layout, kinds), x_btd.float())

        return self.once(f"view {site} {tuple(kinds)}", made)


def rebased(layout: Mapping[str, slice], kinds: Sequence[str]) -> dict[str, slice]:
    """Token kind -> slice within the chosen tokens only, in the site's order."""
    found, start = {}, 0
    for kind, part in layout.items():
        if kind in kinds:
            stop = start + part.stop - part.start
            found[kind] = slice(start, stop)
            start = stop
    return found


@dataclass(frozen=True)
class View:
    """x_btd: raw float32 activations of b images, the t tokens that an SAE covers.

    For an SAE on an SAE, x are the codes of the one below it, and `below` is what that one sees,
    and what decoding its codes takes.
    """

    images: Images
    site: str
    kinds: Mapping[str, slice]
    x_btd: torch.Tensor
    below: tuple[View, Coder, Frame | None] | None = None
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    def above(self, coder: Coder, site: str, tile_bytes: int) -> View:
        """What an SAE on `coder` sees: its codes of these tokens, dense."""
        codes = coder.encode(self.x_nd, tile_bytes=tile_bytes)
        x_btd = codes.dense().unflatten(0, self.x_btd.shape[:2])
        return View(self.images, site, self.kinds, x_btd, (self, coder, codes.frame))

    def to_backbone(self, x_btd: torch.Tensor) -> tuple[View, torch.Tensor]:
        """The view at the backbone's own site, and there what stands for these activations."""
        if self.below is None:
            return self, x_btd
        view, coder, frame = self.below
        decoded_nd = coder.decode(Codes.from_dense(x_btd.flatten(0, 1), frame))
        return view.to_backbone(decoded_nd.view_as(view.x_btd))

    @property
    def root(self) -> View:
        """The view at the backbone's own site."""
        return self if self.below is None else self.below[0].root

    @property
    def coders_below(self) -> tuple[Coder, ...]:
        """The coders of the chain below, the backbone's first."""
        return () if self.below is None else (*self.below[0].coders_below, self.below[1])

    @cached_property
    def x_nd(self) -> torch.Tensor:
        """The same as rows, image-major. Errors: NonFiniteError."""
        check_finite(self.x_btd, self.images.backbone, self.site, self.images.ids[0])
        return self.x_btd.reshape(-1, self.x_btd.shape[-1])


def check_finite(x: torch.Tensor, backbone: Backbone, site: str, image: str) -> None:
    """Errors: NonFiniteError where activations of a batch that begins with `image` are not."""
    if not all_finite(x):
        raise NonFiniteError(
            f"the activations of '{backbone.spec.name}' at '{site}' are NaN or infinite "
            f"near image {image}",
            "try --dtype float32, and look at the image",
        )
