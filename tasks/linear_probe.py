"""What a linear classifier loses where it reads the reconstruction, or the codes, in place of x.

Probes are fitted on train images, of a feature of the tokens that the SAE covers, and read test
images once (`saebench.probing`). In all measures accuracy is top-1, top-5 and macro, the mean over
classes; loss is the mean cross-entropy in nat:

    probe_*_x            fitted on x, reading x: the backbone's own
    probe_*_xhat_frozen  the same probe, reading x̂: does a head that is there still work
    probe_*_xhat_refit   fitted on x̂, reading x̂: is what it takes still there
    probe_*_codes        fitted on the codes of an image; sparse_probe_*_kK of the K best latents
    tree_*_codes         a decision tree of bounded depth, on the best latents
    probe_delta_*, probe_loss_increase_*   a measure − that of x, whose value is in `baseline`

    probe_r_1d = mean over classes of 1 − CE of the best single latent / CE of the prevalence:
                 best of the 32 latents that correlate most with the class

Latents are ranked, and penalties chosen, on train images alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final

from saebench.task import Batch, Context, Measurement, Metric, Option, Task

if TYPE_CHECKING:
    from saebench.metrics.probe_scores import Score, Value
    from saebench.probing.measures import Asked, Rows
    from saebench.probing.probes import Probes

_SHARE: Final = "1", "higher", (0, 1), "bootstrap"
_OF_X: Final = "1", "none", (0, 1), "bootstrap"
_DELTA: Final = "1", "higher", (-1, 1), "bootstrap"
_LOSS: Final = "nat", "lower", (0, None), "bootstrap"
_LOSS_OF_X: Final = "nat", "none", (0, None), "bootstrap"
_INCREASE: Final = "nat", "lower", (None, None), "bootstrap"
_GAIN: Final = "1", "higher", (None, 1), "bootstrap"


class LinearProbe(Task):
    name, version = "linear_probe", 1
    needs = ("probes",)
    suite = "full"  # it takes a pass over train images, and a dozen fits an SAE
    options: ClassVar[Mapping[str, Option]] = {
        "feature": Option(
            "auto",
            ("auto", "cls", "mean", "cls+mean", "pooled", "embedding"),
            "what a probe reads; auto: CLS where it is covered, else the mean of the tokens",
        ),
        "label": Option("", doc="label level that is told apart; by default the main label"),
        "shots": Option("full", doc="train images a class, or full: all that there are"),
        "solver": Option(
            "logistic", ("logistic", "ridge"), "ridge: a quick stand-in, without probabilities"
        ),
    }
    metrics = (
        Metric("probe_accuracy_x", *_OF_X, "probe on x: top-1"),
        Metric("probe_accuracy_x_top5", *_OF_X, "top-5"),
        Metric("probe_accuracy_x_macro", *_OF_X, "mean over classes"),
        Metric("probe_loss_x", *_LOSS_OF_X, "mean cross-entropy"),
        Metric("probe_accuracy_xhat_frozen", *_SHARE, "the probe on x, reading x̂: top-1"),
        Metric("probe_accuracy_xhat_frozen_top5", *_SHARE, "top-5"),
        Metric("probe_accuracy_xhat_frozen_macro", *_SHARE, "mean over classes"),
        Metric("probe_loss_xhat_frozen", *_LOSS, "mean cross-entropy"),
        Metric("probe_accuracy_xhat_refit", *_SHARE, "probe fitted on x̂: top-1"),
        Metric("probe_accuracy_xhat_refit_top5", *_SHARE, "top-5"),
        Metric("probe_accuracy_xhat_refit_macro", *_SHARE, "mean over classes"),
        Metric("probe_loss_xhat_refit", *_LOSS, "mean cross-entropy"),
        Metric("probe_accuracy_codes", *_SHARE, "probe on codes: top-1"),
        Metric("probe_accuracy_codes_top5", *_SHARE, "top-5"),
        Metric("probe_accuracy_codes_macro", *_SHARE, "mean over classes"),
        Metric("probe_loss_codes", *_LOSS, "mean cross-entropy"),
        Metric("probe_delta_frozen", *_DELTA, "probe_accuracy_xhat_frozen − …_x"),
        Metric("probe_delta_frozen_top5", *_DELTA, "top-5"),
        Metric("probe_delta_frozen_macro", *_DELTA, "mean over classes"),
        Metric("probe_loss_increase_frozen", *_INCREASE, "probe_loss_xhat_frozen − …_x"),
        Metric("probe_delta_refit", *_DELTA, "probe_accuracy_xhat_refit − …_x"),
        Metric("probe_delta_refit_top5", *_DELTA, "top-5"),
        Metric("probe_delta_refit_macro", *_DELTA, "mean over classes"),
        Metric("probe_loss_increase_refit", *_INCREASE, "probe_loss_xhat_refit − …_x"),
        Metric("probe_delta_codes", *_DELTA, "probe_accuracy_codes − …_x"),
        Metric("probe_delta_codes_top5", *_DELTA, "top-5"),
        Metric("probe_delta_codes_macro", *_DELTA, "mean over classes"),
        Metric("probe_loss_increase_codes", *_INCREASE, "probe_loss_codes − …_x"),
        Metric("sparse_probe_accuracy_k1", *_SHARE, "probe on the best latent: top-1"),
        Metric("sparse_probe_accuracy_k1_top5", *_SHARE, "top-5"),
        Metric("sparse_probe_accuracy_k1_macro", *_SHARE, "mean over classes"),
        Metric("sparse_probe_loss_k1", *_LOSS, "mean cross-entropy"),
        Metric("sparse_probe_delta_k1", *_DELTA, "− probe_accuracy_x"),
        Metric("sparse_probe_delta_k1_top5", *_DELTA, "top-5"),
        Metric("sparse_probe_delta_k1_macro", *_DELTA, "mean over classes"),
        Metric("sparse_probe_loss_increase_k1", *_INCREASE, "− probe_loss_x"),
        Metric("sparse_probe_accuracy_k2", *_SHARE, "on the 2 best: top-1"),
        Metric("sparse_probe_accuracy_k2_top5", *_SHARE, "top-5"),
        Metric("sparse_probe_accuracy_k2_macro", *_SHARE, "mean over classes"),
        Metric("sparse_probe_loss_k2", *_LOSS, "mean cross-entropy"),
        Metric("sparse_probe_delta_k2", *_DELTA, "− probe_accuracy_x"),
        Metric("sparse_probe_delta_k2_top5", *_DELTA, "top-5"),
        Metric("sparse_probe_delta_k2_macro", *_DELTA, "mean over classes"),
        Metric("sparse_probe_loss_increase_k2", *_INCREASE, "− probe_loss_x"),
        Metric("sparse_probe_accuracy_k5", *_SHARE, "on the 5 best: top-1"),
        Metric("sparse_probe_accuracy_k5_top5", *_SHARE, "top-5"),
        Metric("sparse_probe_accuracy_k5_macro", *_SHARE, "mean over classes"),
        Metric("sparse_probe_loss_k5", *_LOSS, "mean cross-entropy"),
        Metric("sparse_probe_delta_k5", *_DELTA, "− probe_accuracy_x"),
        Metric("sparse_probe_delta_k5_top5", *_DELTA, "top-5"),
        Metric("sparse_probe_delta_k5_macro", *_DELTA, "mean over classes"),
        Metric("sparse_probe_loss_increase_k5", *_INCREASE, "− probe_loss_x"),
        Metric("sparse_probe_accuracy_k10", *_SHARE, "on the 10 best: top-1"),
        Metric("sparse_probe_accuracy_k10_top5", *_SHARE, "top-5"),
        Metric("sparse_probe_accuracy_k10_macro", *_SHARE, "mean over classes"),
        Metric("sparse_probe_loss_k10", *_LOSS, "mean cross-entropy"),
        Metric("sparse_probe_delta_k10", *_DELTA, "− probe_accuracy_x"),
        Metric("sparse_probe_delta_k10_top5", *_DELTA, "top-5"),
        Metric("sparse_probe_delta_k10_macro", *_DELTA, "mean over classes"),
        Metric("sparse_probe_loss_increase_k10", *_INCREASE, "− probe_loss_x"),
        Metric("sparse_probe_accuracy_k20", *_SHARE, "on the 20 best: top-1"),
        Metric("sparse_probe_accuracy_k20_top5", *_SHARE, "top-5"),
        Metric("sparse_probe_accuracy_k20_macro", *_SHARE, "mean over classes"),
        Metric("sparse_probe_loss_k20", *_LOSS, "mean cross-entropy"),
        Metric("sparse_probe_delta_k20", *_DELTA, "− probe_accuracy_x"),
        Metric("sparse_probe_delta_k20_top5", *_DELTA, "top-5"),
        Metric("sparse_probe_delta_k20_macro", *_DELTA, "mean over classes"),
        Metric("sparse_probe_loss_increase_k20", *_INCREASE, "− probe_loss_x"),
        Metric("sparse_probe_accuracy_k50", *_SHARE, "on the 50 best: top-1"),
        Metric("sparse_probe_accuracy_k50_top5", *_SHARE, "top-5"),
        Metric("sparse_probe_accuracy_k50_macro", *_SHARE, "mean over classes"),
        Metric("sparse_probe_loss_k50", *_LOSS, "mean cross-entropy"),
        Metric("sparse_probe_delta_k50", *_DELTA, "− probe_accuracy_x"),
        Metric("sparse_probe_delta_k50_top5", *_DELTA, "top-5"),
        Metric("sparse_probe_delta_k50_macro", *_DELTA, "mean over classes"),
        Metric("sparse_probe_loss_increase_k50", *_INCREASE, "− probe_loss_x"),
        Metric("sparse_probe_accuracy_k100", *_SHARE, "on the 100 best: top-1"),
        Metric("sparse_probe_accuracy_k100_top5", *_SHARE, "top-5"),
        Metric("sparse_probe_accuracy_k100_macro", *_SHARE, "mean over classes"),
        Metric("sparse_probe_loss_k100", *_LOSS, "mean cross-entropy"),
        Metric("sparse_probe_delta_k100", *_DELTA, "− probe_accuracy_x"),
        Metric("sparse_probe_delta_k100_top5", *_DELTA, "top-5"),
        Metric("sparse_probe_delta_k100_macro", *_DELTA, "mean over classes"),
        Metric("sparse_probe_loss_increase_k100", *_INCREASE, "− probe_loss_x"),
        Metric("tree_accuracy_codes", *_SHARE, "decision tree on codes: top-1"),
        Metric("tree_accuracy_codes_macro", *_SHARE, "mean over classes"),
        Metric("tree_delta_codes", *_DELTA, "− probe_accuracy_x"),
        Metric("tree_delta_codes_macro", *_DELTA, "mean over classes"),
        Metric(
            "probe_r_1d", *_GAIN, "best latent a class, of 32: mean of 1 − CE / CE of prevalence"
        ),
    )

    def start(self, ctx: Context) -> None:
        from saebench.metrics.probing import Predictions
        from saebench.probing.predicting import Predictor, SingleCodes

        self.ctx = ctx
        self.probes: Probes = ctx.probes
        self.scores = ctx.options.get("solver") == "ridge"
        self.no_xhat = self.probes.missing.get("xhat", "") or self._unseen()
        self.apply = Predictor(self.probes, scores=self.scores, xhat=not self.no_xhat)
        self.predictions, self.single = Predictions(), None
        self.parts = {"predictions": self.predictions}
        if self.probes.single is not None:
            self.single = SingleCodes(self.probes.single)
            self.parts["single"] = self.single

    @cached_property
    def columns(self) -> Mapping[str, Any]:
        """What every row states; of an embedding also how it was made."""
        of_embedding = self.probes.feature.name == "embedding"
        more = {"last_block": self.ctx.last_block} if of_embedding else {}
        return {**self.probes.columns, **more}

    @cached_property
    def variant(self) -> Mapping[str, Any]:
        """What tells every row from those of the default."""
        last_block = self.columns.get("last_block", "full")
        return {
            **self.probes.variant,
            **({} if last_block == "full" else {"last_block": last_block}),
        }

    def _unseen(self) -> str:
        """Why the splice of x̂ says nothing of the embedding; '' where that is not read."""
        if self.probes.feature.name != "embedding":
            return ""
        seen = self.ctx.sees("sae_tokens", "embedding")
        if seen is None:
            return f"the site {self.ctx.site} has no tokens 'sae_tokens'"
        if not seen:
            return "vacuous: the embedding cannot change with the tokens 'sae_tokens'"
        return self.ctx.refused("sae_tokens")

    def update(self, batch: Batch) -> None:
        from saebench.metrics.bootstrap import image_keys

        found = self.apply(batch)
        keys_b = batch.shared_by_all(
            "linear_probe: keys", lambda: image_keys(self.ctx.dataset, batch.ids)
        )
        self.predictions.add(keys_b, found.labels_b.cpu().numpy(), found.slots)
        if self.single is not None and found.codes is not None:
            self.single.add(found.codes)

    # --- rows --------------------------------------------------------------------------------

    def results(self) -> Iterator[Measurement]:
        from saebench.metrics.probe_scores import evaluate, n_present
        from saebench.probing.measures import Rows, scores_of

        state = self.predictions.state()
        n = len(state.get("labels", ()))
        d_codes = self.ctx.d_sae * len(self.probes.feature.code_parts)
        rows = Rows(self.probes, self.scores, self.no_xhat, d_codes)
        asked = list(rows)
        found = evaluate(state, scores_of(asked)) if n else {}
        some = self._some(n_present(state)) if n else ""
        for row in asked:
            yield self._measurement(row, found, n, some)
        yield self._single_latents(rows, state, n)

    def _some(self, n_classes: int) -> str:
        """A note where not all classes have images."""
        c = self.probes.n_classes
        return f"over the {n_classes} of {c} classes that have images" if n_classes < c else ""

    def _measurement(
        self, row: Asked, found: Mapping[Score, Value], n: int, some: str
    ) -> Measurement:
        why = row.why or ("" if n else "no images")
        notes = row.note, some if row.score.what == "macro" else ""
        value = None if why else found[row.score]
        baseline = {"baseline": found[row.baseline].value} if row.baseline and not why else {}
        return Measurement(
            row.metric,
            value.value if value else None,
            n,
            variant={**self.variant, **row.variant},
            columns={**self.columns, **row.columns, **baseline},
            replicates=value.replicates if value else None,
            note=why or "; ".join(filter(None, notes)),
        )

    def _single_latents(self, rows: Rows, state: Mapping[str, Any], n: int) -> Measurement:
        from saebench.metrics.probe_scores import single_gain

        columns = {**self.columns, "pooling": rows.pooling, **rows.fitted_on("single")}
        given: Any = {"variant": self.variant, "columns": columns}
        if self.single is None or not n:
            why = rows.no_codes or ("no images" if self.single else "no latent was fitted")
            return Measurement("probe_r_1d", None, n, note=why, **given)
        gain, used = single_gain(state, *self.single.sums(state["keys"], state["labels"]))
        return Measurement(
            "probe_r_1d",
            gain.value,
            n,
            replicates=gain.replicates,
            note=self._some(used),
            **given,
        )
