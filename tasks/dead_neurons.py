"""Dead neurons: which share of the latents never fires, and what that is worth on N rows.

    dead_fraction = #{j : z_ij = 0 on all N rows}/s; with `budget`, on the first 10³, 10⁴, … rows
    dead_rate_upper95 = 1 − 0.05^(1/N) ≈ 3/N, the largest firing rate that 95 of 100 such latents
        could have: a latent that looks dead may fire more rarely than that. Rows of one image
        depend on each other, so with basis = images, N is the number of images.

"Dead" is a statement about N rows, not about the latent: read it with N, or at equal budgets. A
bootstrap over images would say nothing about rows that were not seen, hence the bound instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from saebench.task import Batch, Context, Measurement, Metric, Task

if TYPE_CHECKING:
    import numpy as np


class DeadNeurons(Task):
    name, version = "dead_neurons", 1
    has_conventions = True
    metrics = (
        Metric("dead_fraction", "1", "lower", (0, 1), "bound", "share that fires on no row"),
        Metric("dead_rate_upper95", "1", "none", (0, 1), "bound", "1 − 0.05^(1/N)"),
    )

    def start(self, ctx: Context) -> None:
        from saebench.metrics.latents import Activity, FirstFiring
        from saebench.metrics.sums import Total

        self.ctx, self.kinds = ctx, list(ctx.kinds.values())
        size = len(self.kinds) * ctx.d_sae
        self.images = Total()
        self.first = FirstFiring(size)
        self.parts = {"images": self.images, "first": self.first}
        if ctx.conventions:
            self.activity = Activity(size)
            self.whole = Activity(ctx.d_sae)  # all token kinds together
            self.parts |= {"activity": self.activity, "whole": self.whole}

    def update(self, batch: Batch) -> None:
        from saebench.metrics.latents import Firings, ImageTable, stretches

        codes, t, s = batch.codes, self.ctx.n_tokens, self.ctx.d_sae
        self.images.add(batch.n_images, batch.n_images)
        for some in stretches(batch.n_images, codes.n_nonzero, len(self.kinds) * s):
            part = codes[some.start * t : some.stop * t]
            firings = Firings.of(*part.nonzero(), tokens=t, d_sae=s, kinds=self.kinds)
            self.first.add(firings, batch.first + some.start)
            if self.ctx.conventions:
                self.activity.add(firings, ImageTable.of(firings, some))
                together = firings.any_kind(s)
                self.whole.add(together, ImageTable.of(together, some))

    def results(self) -> Iterator[Measurement]:
        n_images = self.images.n
        for group, members in self.ctx.groups.items():
            parts = [self.kinds[i] for i in members]
            tokens = sum(part.stop - part.start for part in parts)
            n = n_images * tokens
            if not self.ctx.d_sae or not n:
                why = "no rows" if self.ctx.d_sae else "a coder without latents"
                yield Measurement("dead_fraction", None, n=n, group=group, note=why)
            else:
                yield from self._dead(group, members, n)
            yield from self._bounds(group, n, n_images)

    def _dead(self, group: str, members: list[int], n: int) -> Iterator[Measurement]:
        from saebench.metrics.latents import NEVER

        first_s = self._first_row(members)
        yield Measurement("dead_fraction", float((first_s == NEVER).mean()), n=n, group=group)
        budget = 1000
        while budget <= n:
            dead = float((first_s >= budget).mean())
            yield Measurement(
                "dead_fraction",
                dead,
                n=budget,
                n_images=-(-budget * self.images.n // n),  # whole images, the last one begun
                group=group,
                variant={"budget": budget},
            )
            budget *= 10
        if self.ctx.conventions:
            yield from self._peers(group, members, n)

    def _first_row(self, members: list[int]) -> np.ndarray:
        """[s] the place of each latent's first firing among the group's own rows."""
        import numpy as np

        from saebench.metrics.latents import NEVER

        row_gs = self.first.row_g.reshape(len(self.kinds), -1)
        if len(members) == len(self.kinds):
            return row_gs.min(axis=0)
        part, t = self.kinds[members[0]], self.ctx.n_tokens
        row_s = row_gs[members[0]]
        own_s = row_s // t * (part.stop - part.start) + row_s % t - part.start
        return np.where(row_s == NEVER, NEVER, own_s)

    def _bounds(self, group: str, n: int, n_images: int) -> Iterator[Measurement]:
        for count, variant in ((n, {}), (n_images, {"basis": "images"})):
            yield Measurement(
                "dead_rate_upper95",
                -math.expm1(math.log(0.05) / count) if count else None,
                n=count,
                group=group,
                variant=variant,
                note="" if count else "no rows",
            )

    def _peers(self, group: str, members: list[int], n: int) -> Iterator[Measurement]:
        from saebench.metrics.conventions import DEAD, Firing

        activity = self.whole if group == "all" else self.activity
        at = 0 if group == "all" else members[0]
        s = self.ctx.d_sae
        firing = Firing(
            n, *(a.reshape(-1, s)[at] for a in (activity.rows_g, activity.sum_g, activity.images_g))
        )
        for project, formula in DEAD.items():
            yield Measurement(
                "dead_fraction",
                formula(firing),
                n=n,
                group=group,
                variant={"convention": project},
            )
