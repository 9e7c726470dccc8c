"""Sparsity: how many latents are active, how strongly, and how often each of them is.

With codes z of N rows (one token of one image) and s latents:

    l0 = mean #{j : z_ij ≠ 0} · l0_image = mean over images of the distinct latents on any row
    l1 = mean Σ_j |z_ij| · l1_scaled = mean Σ_j |z_ij|·‖W_dec row j‖, comparable across SAEs
    density p_j = #{i : z_ij ≠ 0}/N, by its quantiles over the latents
    dense_fraction = #{j : p_j > τ}/s, τ = 0.01 (also 0.1)
    almost_dead_fraction = #{j : 0 < p_j < 1e-5}/s, from a million rows on

Also the latents table, one row a latent and token kind: density, rows and images on which it
fired, maximum and mean when active, the row (in evaluation order) of its first firing, the sixteen
images of largest value with token and value, and, of those images, the commonest class and its
share (`purity`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from saebench.task import Batch, Context, Measurement, Metric, Task

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from saebench.codes import Codes

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
ALMOST_DEAD_ROWS = 1_000_000
_PEERS = "reported by other projects, with --conventions"
_TERMS = ("rows", "l0", "l1", "l1_scaled")


class Sparsity(Task):
    name, version = "sparsity", 1
    has_conventions = True
    metrics = (
        Metric("l0", "latents", "none", (0, None), "bootstrap", "mean #{j : z_ij ≠ 0}"),
        Metric("l0_image", "latents", "none", (0, None), "bootstrap", "distinct on an image"),
        Metric("l1", "code", "none", (0, None), "bootstrap", "mean Σ_j |z_ij|"),
        Metric("l1_scaled", "act", "none", (0, None), "bootstrap", "mean Σ_j |z_ij|·‖W_dec row‖"),
        Metric("density", "1", "none", (0, 1), doc="quantile over latents of #{i : z_ij ≠ 0} / N"),
        Metric("dense_fraction", "1", "none", (0, 1), doc="#{j : p_j > τ} / s, τ = 0.01"),
        Metric("almost_dead_fraction", "1", "none", (0, 1), doc="#{j : 0 < p_j < 1e-5} / s"),
        Metric("sparsity", "1", "none", doc=_PEERS),
        Metric("normalized_freq", "1", "none", doc=_PEERS),
    )

    def start(self, ctx: Context) -> None:
        from saebench.metrics.conventions import code_shapes
        from saebench.metrics.latents import Activity, FirstFiring, TopImages
        from saebench.metrics.sums import ImageSums, Sums

        self.ctx, self.kinds = ctx, list(ctx.kinds.values())
        g = len(self.kinds)
        self.rows = ImageSums(g, len(_TERMS))
        self.images = ImageSums(g + 1, 2)  # images and their distinct latents; all kinds come last
        self.activity = Activity(g * ctx.d_sae)
        self.first = FirstFiring(g * ctx.d_sae)
        self.top = TopImages(g * ctx.d_sae)
        self.parts = {
            "rows": self.rows,
            "images": self.images,
            "activity": self.activity,
            "first": self.first,
            "top": self.top,
        }
        if ctx.conventions:
            self.peers = Sums(**code_shapes(g, ctx.d_sae))
            self.parts["peers"] = self.peers

    def update(self, batch: Batch) -> None:
        import torch

        from saebench.metrics.conventions import code_terms
        from saebench.metrics.latents import Firings, ImageTable, stretches
        from saebench.metrics.sums import Contracted, per_kind

        codes, t, s = batch.codes, self.ctx.n_tokens, self.ctx.d_sae
        norms_s = batch.decoder_norms_s.to(codes.device, torch.float64)
        terms, distinct = [], []
        for some in stretches(batch.n_images, codes.n_nonzero, len(self.kinds) * s):
            part = codes[some.start * t : some.stop * t]
            terms.append(_row_terms(part, norms_s))
            firings = Firings.of(*part.nonzero(), tokens=t, d_sae=s, kinds=self.kinds)
            table = ImageTable.of(firings, some)
            self.first.add(firings, batch.first + some.start)
            self.activity.add(firings, table)
            self.top.add(table, batch.first + some.start, batch.labels[some])
            distinct.append(table.distinct(len(self.kinds)))
            if self.ctx.conventions:
                norm_n = batch.x_btd[some].double().norm(dim=2).flatten()
                self.peers.add(**code_terms(firings, norm_n, len(self.kinds), s))
        terms_gbq = per_kind(torch.cat(terms).unflatten(0, (-1, t)), self.kinds)
        self.rows.add(Contracted.of(terms_gbq, batch.weights_br))
        counts_gb = torch.cat(distinct, dim=1).double()
        images_gbq = torch.stack([torch.ones_like(counts_gb), counts_gb], dim=2)
        self.images.add(Contracted.of(images_gbq, batch.weights_br))

    def results(self) -> Iterator[Measurement]:
        for group, members in self.ctx.groups.items():
            n = int(self.rows.totals_gq[members, 0].sum())
            yield from self._means(group, members, n)
            yield from self._densities(group, members, n)
            if self.ctx.conventions:
                yield from self._peers(group, members, n)

    def _means(self, group: str, members: list[int], n: int) -> Iterator[Measurement]:
        from saebench.metrics import defined, ratio

        totals_q = self.rows.totals_gq[members].sum(axis=0)
        replicates_rq = self.rows.replicates_grq[members].sum(axis=0)
        for i, metric in enumerate(_TERMS[1:], start=1):
            value = defined(ratio(totals_q[i], totals_q[0]))
            yield Measurement(
                metric,
                value,
                n=n,
                group=group,
                replicates=ratio(replicates_rq[:, i], replicates_rq[:, 0]),
                note="" if value is not None else "no rows",
            )
        at = members[0] if group != "all" else len(self.kinds)
        images, distinct = self.images.totals_gq[at]
        value = defined(ratio(distinct, images))
        replicates_rq = self.images.replicates_grq[at]
        yield Measurement(
            "l0_image",
            value,
            n=int(images),
            group=group,
            replicates=ratio(replicates_rq[:, 1], replicates_rq[:, 0]),
            note="" if value is not None else "no images",
        )

    def _densities(self, group: str, members: list[int], n: int) -> Iterator[Measurement]:
        import numpy as np

        s = self.ctx.d_sae
        if not s or not n:
            why = "a coder without latents" if not s else "no rows"
            for metric in ("density", "dense_fraction", "almost_dead_fraction"):
                yield Measurement(metric, None, n=n, group=group, note=why)
            return
        density_s = self.activity.rows_g.reshape(-1, s)[members].sum(axis=0) / n
        for q in QUANTILES:
            value = float(np.quantile(density_s, q))
            yield Measurement("density", value, n=n, group=group, variant={"quantile": q})
        dense = float(np.mean(density_s > 0.01))
        yield Measurement("dense_fraction", dense, n=n, group=group)
        dense = float(np.mean(density_s > 0.1))
        yield Measurement("dense_fraction", dense, n=n, group=group, variant={"tau": 0.1})
        rare = float(np.mean((density_s > 0) & (density_s < 1e-5)))
        enough = n >= ALMOST_DEAD_ROWS
        yield Measurement(
            "almost_dead_fraction",
            rare if enough else None,
            n=n,
            group=group,
            note="" if enough else f"needs {ALMOST_DEAD_ROWS:,} rows, and there are {n:,}",
        )

    def _peers(self, group: str, members: list[int], n: int) -> Iterator[Measurement]:
        from saebench.metrics.conventions import sparsity_values

        sums = {name: value[members].sum(axis=0) for name, value in self.peers.values.items()}
        for metric, project, variant, value in sparsity_values(sums, n, self.ctx.d_sae):
            yield Measurement(
                metric,
                value,
                n=n,
                group=group,
                variant={"convention": project, **variant},
                note="" if value is not None else "this project's formula divides by 0 here",
            )

    def latents(self) -> Mapping[str, np.ndarray]:
        """See the module's first lines. Rows go by token kind, then by latent."""
        import numpy as np

        s, kinds = self.ctx.d_sae, self.ctx.kinds
        rows_g = self.activity.rows_g
        n_g = np.repeat(self.rows.totals_gq[:, 0], s)
        silent_g = rows_g == 0
        missing = self.top.image < 0
        columns: dict[str, Any] = {
            "group": np.repeat(np.array(list(kinds)), s),
            "latent": np.tile(np.arange(s), len(kinds)),
            "density": rows_g / np.maximum(n_g, 1),
            "n_active": rows_g,
            "n_images_active": self.activity.images_g,
            "max": np.ma.masked_array(self.activity.max_g, silent_g),
            "mean_active": np.ma.masked_array(
                self.activity.sum_g / np.maximum(rows_g, 1), silent_g
            ),
            "first_row": np.ma.masked_array(self.first.row_g, silent_g),
            "top_images": np.ma.masked_array(self.top.image, missing),
            "top_tokens": np.ma.masked_array(self.top.token, missing),
            "top_values": np.ma.masked_array(self.top.value, missing),
        }
        if self.ctx.class_names:
            best_g, purity_g = self.top.best_class()
            columns["best_class"] = np.ma.masked_array(best_g, silent_g)
            columns["purity"] = np.ma.masked_array(purity_g, silent_g)
        return columns


def _row_terms(codes: Codes, norms_s: Tensor) -> Tensor:
    """[n 4] float64, the terms `_TERMS` of every row."""
    import torch

    size_m = codes.values_m.double().abs()
    l0_n = codes.l0_n().double()
    l1_n, l1_scaled_n = codes.sum_n(size_m), codes.sum_n(size_m * norms_s[codes.indices_m])
    return torch.stack([torch.ones_like(l0_n), l0_n, l1_n, l1_scaled_n], dim=1)
