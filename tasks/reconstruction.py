"""Reconstruction: how well an SAE's output stands for the activations it was given.

With rows x (one token of one image), x̂ their reconstruction, r = x − x̂, μ the mean of x:

    mse = Σ‖r‖²/(N d) · mse_per_token = Σ‖r‖²/N
    fvu = Σ‖r‖²/Σ‖x − μ‖² · explained_variance = 1 − fvu
    cosine = mean x·x̂/(‖x‖‖x̂‖) · l2_ratio = mean ‖x̂‖/‖x‖
    relative_reconstruction_bias = Σ‖x̂‖²/Σx·x̂                         (arXiv 2404.16014, Eq. 10)

One ratio of sums over all rows, in raw activation space; intervals by a bootstrap over images.
cosine and l2_ratio are inflated by a large common mean of the activations: read them beside fvu.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from saebench.task import Batch, Context, Measurement, Metric, Task

if TYPE_CHECKING:
    from saebench.metrics.reconstruction import Accumulated

_PEERS = "reported by other projects, with --conventions"


class Reconstruction(Task):
    name, version = "reconstruction", 1
    has_conventions = True
    metrics = (
        Metric("explained_variance", "1", "higher", (None, 1), "bootstrap", "1 − fvu"),
        Metric("fvu", "1", "lower", (0, None), "bootstrap", "Σ‖r‖² / Σ‖x − μ‖²"),
        Metric("mse", "act²", "lower", (0, None), "bootstrap", "Σ‖r‖² / (N d)"),
        Metric("mse_per_token", "act²", "lower", (0, None), "bootstrap", "Σ‖r‖² / N"),
        Metric("cosine", "1", "higher", (-1, 1), "bootstrap", "mean x·x̂ / (‖x‖ ‖x̂‖)"),
        Metric("l2_ratio", "1", "one", (0, None), "bootstrap", "mean ‖x̂‖ / ‖x‖"),
        Metric(
            "relative_reconstruction_bias", "1", "one", (None, None), "bootstrap", "Σ‖x̂‖² / Σ x·x̂"
        ),
        Metric("r2", "1", "higher", doc=_PEERS),
        Metric("nmse", "1", "lower", doc=_PEERS),
        Metric("mse_per_dim", "act²", "lower", doc=_PEERS),
        Metric("l2_loss", "act", "lower", doc=_PEERS),
        Metric("avg_l2", "act", "lower", doc=_PEERS),
    )

    def start(self, ctx: Context) -> None:
        import numpy as np

        from saebench.metrics.conventions import peer_shapes
        from saebench.metrics.reconstruction import ERROR_TERMS
        from saebench.metrics.sums import ImageSums, Sums

        self.ctx, self.kinds = ctx, list(ctx.kinds.values())
        d = ctx.d_model
        self.shift_d = np.zeros(d) if ctx.shift_d is None else np.asarray(ctx.shift_d)
        self.inputs = ImageSums(len(self.kinds), d + 2)
        self.errors = ImageSums(len(self.kinds), len(ERROR_TERMS))
        self.parts = {"inputs": self.inputs, "errors": self.errors}
        if ctx.conventions:
            shapes = {k: (len(self.kinds), *shape) for k, shape in peer_shapes(d).items()}
            self.peers = Sums(**shapes)
            self.parts["peers"] = self.peers

    def update(self, batch: Batch) -> None:
        import torch

        from saebench.metrics.reconstruction import Inputs, error_terms
        from saebench.metrics.sums import Contracted, per_kind

        x_btd, recon_btd = batch.x_btd, batch.recon_btd
        shift_d = torch.as_tensor(self.shift_d, dtype=torch.float64, device=x_btd.device)
        inputs: Inputs = batch.shared(
            "reconstruction: sums of x",
            lambda: Inputs.of(x_btd, shift_d, self.kinds, batch.weights_br),
        )
        terms_nq = error_terms(x_btd.flatten(0, 1), recon_btd.flatten(0, 1), inputs.x2_n)
        terms_btq = terms_nq.unflatten(0, x_btd.shape[:2])
        self.inputs.add(inputs.sums)
        self.errors.add(Contracted.of(per_kind(terms_btq, self.kinds), batch.weights_br))
        if self.ctx.conventions:
            self._add_peers(x_btd, recon_btd, shift_d)

    def _add_peers(self, x_btd: Any, recon_btd: Any, shift_d: Any) -> None:
        import torch

        from saebench.metrics.conventions import peer_terms

        by_kind = [
            peer_terms(x_btd[:, part].flatten(0, 1), recon_btd[:, part].flatten(0, 1), shift_d)
            for part in self.kinds
        ]
        self.peers.add(**{k: torch.stack([terms[k] for terms in by_kind]) for k in by_kind[0]})

    def results(self) -> Iterator[Measurement]:
        from saebench.metrics.reconstruction import Accumulated

        for group, members in self.ctx.groups.items():
            sums, replicates = Accumulated.pair(self.inputs, self.errors, members)
            yield from self._group(group, sums, replicates)
            if self.ctx.conventions:
                yield from self._peers(group, members)

    def _group(
        self, group: str, sums: Accumulated, replicates: Accumulated
    ) -> Iterator[Measurement]:
        from saebench.metrics import defined
        from saebench.metrics import reconstruction as formulas

        n = int(sums.n)
        counted = {"cosine": int(sums.n_cosine), "l2_ratio": int(sums.n_ratio)}
        for metric, undefined in _UNDEFINED.items():
            formula = getattr(formulas, metric)
            used = counted.get(metric, n)
            notes = [f"{n - used} rows of norm 0 are left out"] if used < n else []
            value = defined(formula(sums))
            if value is None:
                notes.append(undefined)
            yield Measurement(
                metric,
                value,
                n=used,
                group=group,
                replicates=None if value is None else formula(replicates),
                note="; ".join(notes),
            )

    def _peers(self, group: str, members: list[int]) -> Iterator[Measurement]:
        import numpy as np

        from saebench.metrics import defined
        from saebench.metrics.conventions import RECONSTRUCTION, Peers

        sums = Peers(**{k: value[members].sum(axis=0) for k, value in self.peers.values.items()})
        for (metric, project), formula in RECONSTRUCTION.items():
            with np.errstate(all="ignore"):
                value = defined(formula(sums))
            yield Measurement(
                metric,
                value,
                n=int(sums.n),
                group=group,
                variant={"convention": project},
                note="" if value is not None else "this project's formula divides by 0 here",
            )


_NO_VARIANCE = "all rows are equal: there is no variance to explain"
_UNDEFINED = {
    "mse": "no rows",
    "mse_per_token": "no rows",
    "fvu": _NO_VARIANCE,
    "explained_variance": _NO_VARIANCE,
    "cosine": "every row of x or of its reconstruction has norm 0",
    "l2_ratio": "every row of x has norm 0",
    "relative_reconstruction_bias": "Σ x·x̂ is 0",
}
