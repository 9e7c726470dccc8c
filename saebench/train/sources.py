"""Images as rows of activations: through a backbone's site, and through an SAE on top of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from saebench.backbones import Backbone
from saebench.data import Dataset
from saebench.data.loader import batches, choose_workers
from saebench.saes import Sae
from saebench.train.stream import Source


class BackboneSource:
    """The token kinds `kinds` of one site, over the train splits of some datasets, end to end.

    `parts`: (dataset, split, positions [n] of its manifest). `watch` is called with the number of
    images of each batch that has gone through the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        site: str,
        kinds: Sequence[str],
        parts: Sequence[tuple[Dataset, str, np.ndarray]],
        *,
        batch_size: int,
        workers: int | None = 0,
        bad_images: Literal["fail", "skip"] = "fail",
        watch: Callable[[int], None] = lambda n: None,
        on_bad: Callable[[str], None] = lambda why: None,
    ) -> None:
        layout = backbone.spec.sites[site]
        places = np.arange(layout.tokens)
        self._tokens = torch.from_numpy(
            np.concatenate([places[part] for kind, part in layout.kinds.items() if kind in kinds])
        ).to(backbone.device)
        self.backbone, self.site, self.parts = backbone, site, parts
        self.batch_size, self.workers, self.watch = batch_size, workers, watch
        self.bad_images: Literal["fail", "skip"] = bad_images
        self.on_bad = on_bad
        self.n_images = sum(len(positions) for _, _, positions in parts)
        self.n_tokens, self.d_model = len(self._tokens), layout.width

    def rows(self, images: np.ndarray) -> Tensor:
        """[len(images)·t d] float32 on the CPU; the images of one dataset after those of another.

        The order within is that of `images`. Batches are cut at fixed places, so that the same
        images give the same bits. Images that do not decode, where they are left out, have no rows.
        """
        rows_nd = torch.empty(len(images) * self.n_tokens, self.d_model)
        end = first = 0
        for dataset, split, positions in self.parts:
            own = images[(images >= first) & (images < first + len(positions))] - first
            first += len(positions)
            for _, images_b3hw in batches(
                dataset,
                split,
                positions[own],
                self.backbone.transform,
                self.batch_size,
                choose_workers(dataset, self.backbone.device)
                if self.workers is None
                else self.workers,
                bad_images=self.bad_images,
                on_bad=lambda row, why: self.on_bad(why),
            ):
                start, end = end, end + len(images_b3hw) * self.n_tokens
                rows_nd[start:end] = self._acts(images_b3hw)
                self.watch(len(images_b3hw))
        return rows_nd[:end]

    def _acts(self, images_b3hw: Tensor) -> Tensor:
        captured = self.backbone.acts(images_b3hw.to(self.backbone.device), [self.site])
        acts_btd = captured[self.site].acts_btd[:, self._tokens]
        return acts_btd.reshape(-1, self.d_model).float().cpu()


class CodesSource:
    """The dense codes of an SAE on another source's rows: what an SAE on an SAE reads."""

    def __init__(self, source: Source, sae: Sae, device: torch.device) -> None:
        self.source, self.sae, self.device = source, sae.to(device), device
        self.n_images, self.n_tokens = source.n_images, source.n_tokens
        self.d_model = sae.d_sae

    def rows(self, images: np.ndarray) -> Tensor:
        """[len(images)·t s] float32 on the CPU."""
        x_nd = self.source.rows(images)
        rows_ns = torch.empty(len(x_nd), self.d_model)
        for start in range(0, len(x_nd), 8192):
            tile = x_nd[start : start + 8192].to(self.device)
            rows_ns[start : start + 8192] = self.sae.encode(tile).dense().cpu()
        return rows_ns
