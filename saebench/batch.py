"""A batch of images on its way through a run: what all SAEs share, and what one SAE sees.

    Images   one batch through the backbone: captures at every site in use, clean output
    View     the tokens of one site that an SAE covers, x_btd; shared by all SAEs on them
    SaeBatch a View and one coder: codes, reconstruction, spliced output   (task.Batch)

Everything is computed on first use and kept for the batch, so that the backbone runs once for all
SAEs, the encoder once for all tasks, and a sum over x once for all SAEs that see the same x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saebench.codes import Codes, Frame
from saebench.errors import Mismatch, NonFiniteError, SaebenchError, UsageError, is_out_of_memory
from saebench.finite import all_finite
from saebench.metrics.bootstrap import poisson_weights

if TYPE_CHECKING:
    from saebench.backbones import Backbone, Capture, Output
    from saebench.saes import Coder


class CoderError(SaebenchError):
    """A coder that cannot encode or decode this batch: all its tasks are dropped, others go on."""


@dataclass(frozen=True)
class Images:
    """b images of a dataset at positions `first` … of the evaluation order."""

    backbone: Backbone
    dataset: str
    ids: Sequence[str]
    labels: np.ndarray
    levels: Mapping[str, np.ndarray]
    first: int
    captures: Mapping[str, Capture]
    _memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def weights_br(self) -> torch.Tensor:
        """[b 500] float64 bootstrap weights, from the ids alone."""
        weights = poisson_weights(self.dataset, self.ids)
        return torch.as_tensor(weights, dtype=torch.float64, device=self.backbone.device)

    def clean_output(self, site: str) -> Output:
        """Output of the untouched images, from the first site that asks, for everybody."""
        if "clean" not in self._memo:
            capture = self.captures[site]
            self._memo["clean"] = self.backbone.resume(site, capture.acts_btd, capture.state)
        return self._memo["clean"]

    def view(self, site: str, kinds: Sequence[str]) -> View:
        """The tokens of these kinds at a site, shared by all who ask for the same."""
        key = f"view {site} {kinds}"
        if key not in self._memo:
            layout = self.backbone.spec.sites[site].kinds
            acts_btd = self.captures[site].acts_btd
            parts = [acts_btd[:, layout[kind]] for kind in layout if kind in kinds]
            x_btd = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            if len(parts) == len(layout):
                x_btd = acts_btd
            self._memo[key] = View(self, site, rebased(layout, kinds), x_btd.float())
        return self._memo[key]


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

    @cached_property
    def x_nd(self) -> torch.Tensor:
        """The same as rows, image-major. Errors: NonFiniteError."""
        check_finite(self.x_btd, self.images.backbone, self.site, self.images.ids[0])
        return self.x_btd.reshape(-1, self.x_btd.shape[-1])


@dataclass(frozen=True)
class SaeBatch:
    """What a task sees: some images and one SAE or control (`saebench.task.Batch`)."""

    view: View
    coder: Coder
    tile_bytes: int

    @property
    def ids(self) -> Sequence[str]:
        return self.view.images.ids

    @property
    def first(self) -> int:
        return self.view.images.first

    @property
    def kinds(self) -> Mapping[str, slice]:
        return self.view.kinds

    @property
    def d_sae(self) -> int:
        return self.coder.d_sae

    @property
    def decoder_norms_s(self) -> torch.Tensor:
        return self.coder.decoder_norms_s

    @property
    def n_images(self) -> int:
        return self.view.x_btd.shape[0]

    @property
    def n_rows(self) -> int:
        return self.view.x_btd.shape[0] * self.view.x_btd.shape[1]

    @property
    def labels(self) -> np.ndarray:
        return self.view.images.labels

    @property
    def levels(self) -> Mapping[str, np.ndarray]:
        return self.view.images.levels

    @property
    def weights_br(self) -> torch.Tensor:
        return self.view.images.weights_br

    @property
    def x_btd(self) -> torch.Tensor:
        return self.view.x_btd

    @property
    def codes(self) -> Codes:
        """Codes of the n = b*t rows. Errors: CoderError (not finite, or the coder failed)."""
        return self._codes

    @cached_property
    def _codes(self) -> Codes:
        x_nd = self.view.x_nd
        return self._guarded("encode", lambda: self.coder.encode(x_nd, tile_bytes=self.tile_bytes))

    @property
    def recon_btd(self) -> torch.Tensor:
        """The reconstruction in raw activation space.

        Errors: CoderError; Mismatch for a transcoder, which reconstructs something else.
        """
        if self.coder.transcoder:
            raise Mismatch(
                "it is a transcoder: what it writes is not an estimate of what it reads",
                "tasks that look at its codes alone can be run",
            )
        return self._recon_btd

    @cached_property
    def _recon_btd(self) -> torch.Tensor:
        codes = self.codes
        recon_nd = self._guarded("decode", lambda: self.coder.decode(codes))
        if not all_finite(recon_nd):
            raise CoderError("its reconstruction is NaN or infinite on finite activations")
        return recon_nd.view_as(self.view.x_btd)

    def _guarded(self, what: str, compute: Callable[[], Any]) -> Any:
        try:
            return compute()
        except (torch.OutOfMemoryError, MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise CoderError(f"it does not {what}: {type(error).__name__}: {error}") from error

    def shared(self, key: str, compute: Callable[[], Any]) -> Any:
        """`compute()` once for all SAEs that see the same tokens of the same site."""
        memo = self.view.memo
        if key not in memo:
            memo[key] = compute()
        return memo[key]

    @property
    def clean_output(self) -> Output:
        view = self.view
        while view.below is not None:
            view = view.below[0]
        return view.images.clean_output(view.site)

    @cached_property
    def _spliced(self) -> dict[str, Output]:
        return {}

    def spliced_output(self, replaced: str = "sae_tokens") -> Output:
        """Output with the reconstruction in place of x.

        `replaced`: "sae_tokens" (all the SAE covers) or one of its token kinds. All other tokens
        pass through untouched, and only what comes after the site is run.
        """
        if replaced not in self._spliced:
            self._spliced[replaced] = self._splice(replaced)
        return self._spliced[replaced]

    def _splice(self, replaced: str) -> Output:
        if replaced != "sae_tokens" and replaced not in self.kinds:
            raise UsageError(
                f"replaced = '{replaced}': this SAE covers {', '.join(self.kinds)}",
                "use sae_tokens, or one of those",
            )
        root, recon_btd = self.view.to_backbone(self.recon_btd)
        images = root.images
        capture = images.captures[root.site]
        acts_btd = capture.acts_btd.clone()
        layout = images.backbone.spec.sites[root.site].kinds
        for kind, part in self.kinds.items():
            if replaced in ("sae_tokens", kind):
                acts_btd[:, layout[kind]] = recon_btd[:, part].to(acts_btd.dtype)
        return images.backbone.resume(root.site, acts_btd, capture.state)


def check_finite(x: torch.Tensor, backbone: Backbone, site: str, image: str) -> None:
    """Errors: NonFiniteError where activations of a batch that begins with `image` are not."""
    if not all_finite(x):
        raise NonFiniteError(
            f"the activations of '{backbone.spec.name}' at '{site}' are NaN or infinite "
            f"near image {image}",
            "try --dtype float32, and look at the image",
        )


TILE_BYTES = 256 * 2**20  # of pre-activations held at once while encoding
SMALLEST_TILE = 4 * 2**20


@dataclass
class Tiles:
    """Row tile of the encoder and images in a batch: halved when memory runs out, never grown."""

    tile_bytes: int
    batch_size: int

    def halve(self) -> bool:
        """First the row tile, then the batch. False when neither can be halved again."""
        if self.tile_bytes > SMALLEST_TILE:
            self.tile_bytes //= 2
        elif self.batch_size > 1:
            self.batch_size //= 2
        else:
            return False
        return True
