"""What a task sees of a batch: some images and one SAE or control (`saebench.task.Batch`).

Codes, reconstruction and spliced outputs are computed on first use and kept for the batch, so that
the encoder runs once for all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saebench.codes import Codes
from saebench.controls import Mean
from saebench.errors import Mismatch, SaebenchError, UsageError, is_out_of_memory
from saebench.finite import all_finite
from saebench.images import View
from saebench.splice import (
    Ablation,
    ablated_output,
    ablation,
    error_preserving,
    policy_kinds,
    replaced_output,
)

if TYPE_CHECKING:
    from saebench.backbones import Output
    from saebench.saes import Coder


class CoderError(SaebenchError):
    """A coder that cannot encode or decode this batch: all its tasks are dropped, others go on."""


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

    def shared_by_all(self, key: str, compute: Callable[[], Any]) -> Any:
        """`compute()` once for all SAEs that see the same images, whatever their sites."""
        return self.view.images.once(key, compute)

    @property
    def places(self) -> range:
        """Positions of the images in the evaluation order."""
        return range(self.first, self.first + self.n_images)

    @property
    def clean_name(self) -> str:
        return self.view.images.clean_from(self.view.root.site)

    @property
    def clean_output(self) -> Output:
        return self.view.images.clean_output(self.view.root.site)

    def ablated_output(self, value: Ablation, ablated: str = "sae_tokens") -> Output:
        """Output with 0 or the train mean for the tokens of a policy: once for all SAEs there.

        Errors: UsageError (the site has no such tokens).
        """
        root = self.view.root
        kinds = self._kinds_of(ablated)
        return root.images.once(
            f"{value} {root.site} {kinds}",
            lambda: ablated_output(root.images, root.site, kinds, value),
        )

    def spliced_output(self, replaced: str = "sae_tokens", *, keep_error: bool = False) -> Output:
        """Output with the reconstruction in place of x, for the tokens of a policy.

        All other tokens pass through untouched, and only what comes after the site is run.
        keep_error: what the reconstruction misses is added back, which gives x and so the clean
        output: a check. Errors: UsageError (the site has no such tokens); CoderError; Mismatch.
        """
        key = (replaced, keep_error)
        if key not in self._spliced:
            root = self.view.root
            parts = self.replacements(self._kinds_of(replaced), keep_error=keep_error)
            self._spliced[key] = replaced_output(root.images, root.site, parts)
        return self._spliced[key]

    def replacements(
        self, kinds: Sequence[str], *, keep_error: bool = False
    ) -> dict[str, torch.Tensor]:
        """Token kind -> [b t d]: what a splice puts in its place at the backbone's own site.

        Errors: CoderError; Mismatch.
        """
        parts = {kind: self._recon_of(kind) for kind in kinds}
        if not keep_error:
            return parts
        root = self.view.root
        layout, acts_btd = root.images.layout(root.site), self._root_acts_btd
        return {
            kind: error_preserving(acts_btd[:, layout[kind]], part) for kind, part in parts.items()
        }

    @cached_property
    def _spliced(self) -> dict[tuple[str, bool], Output]:
        return {}

    @property
    def _root_acts_btd(self) -> torch.Tensor:
        root = self.view.root
        return root.images.captures[root.site].acts_btd

    def _kinds_of(self, policy: str) -> tuple[str, ...]:
        root = self.view.root
        layout = root.images.layout(root.site)
        kinds = policy_kinds(policy, layout, tuple(self.kinds))
        if not kinds:
            raise UsageError(
                f"'{policy}' names no tokens at the site '{root.site}', which has "
                f"{', '.join(layout)}",
                f"use sae_tokens, all, {', '.join(layout)}",
            )
        return kinds

    def _recon_of(self, kind: str) -> torch.Tensor:
        """The reconstruction of a token kind at the backbone's own site, in raw activations.

        Also of tokens that the SAE was not trained on, where a policy asks for them.
        """
        if kind in self.kinds:
            return self._root_recon_btd[:, self.kinds[kind]]
        root = self.view.root
        if isinstance(self.coder, Mean):  # it is made for its own tokens
            return ablation(root.images, root.site, kind, "mean")
        if kind not in self._elsewhere:
            view = root.images.view(root.site, (kind,))
            for coder in self.view.coders_below:
                view = view.above(coder, self.view.site, self.tile_bytes)
            self._elsewhere[kind] = SaeBatch(view, self.coder, self.tile_bytes)
        return self._elsewhere[kind]._root_recon_btd

    @cached_property
    def _elsewhere(self) -> dict[str, SaeBatch]:
        return {}

    @cached_property
    def _root_recon_btd(self) -> torch.Tensor:
        if any(coder.transcoder for coder in self.view.coders_below):
            raise Mismatch(
                "it reads the codes of a transcoder, which are decoded to another activation",
                "such an SAE can be measured on its own codes, and not be spliced",
            )
        return self.view.to_backbone(self.recon_btd)[1]
