"""What an SAE costs downstream: its reconstruction takes the place of x, and the rest is run.

Four passes: clean; spliced (x̂ in the place of x); zero and mean (0, or the train mean of the token
kind, in its place). For each head that reads the final embedding, over images:

    loss_* = mean cross-entropy · loss_increase = loss_spliced − loss_clean
    loss_recovered = (loss_zero − loss_spliced)/(loss_zero − loss_clean), one ratio of means
    loss_recovered_mean, the same against mean ablation
    accuracy_*, accuracy_top5_* · agreement_* with the clean prediction · kl_* = KL(clean ‖ other)

and, without labels, of the embedding e, once: embedding_cosine_*, embedding_nmse_* =
Σ‖ê − e‖²/Σ‖e − ē‖². Where a dataset has captions, also image-text retrieval in blocks of 128.
Nothing is clamped: values above 1 and below 0 are real. What the tokens cannot change is vacuous.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from saebench.task import Batch, Context, Measurement, Metric, Option, Task

if TYPE_CHECKING:
    import numpy as np

    from saebench.passes import Passes
    from saebench.retrieval import Block

POLICIES = ("sae_tokens", "all", "cls", "distillation", "registers", "patches", "grid", "pooled")
_PEERS = "reported by other projects, with --conventions"
_BOOT, _POSITIVE, _ANY, _SHARE = "bootstrap", (0, None), (None, None), (0, 1)
_READ = {
    "any": "the output",
    "embedding": "the embedding",
    "features": "what a linear head reads",
}
_NONE: Mapping[str, str] = {}


class LossSubstitution(Task):
    name, version = "loss_substitution", 1
    needs = ("readouts",)
    splices = has_conventions = True
    options: ClassVar[Mapping[str, Option]] = {
        "replaced": Option("sae_tokens", POLICIES, "tokens that the reconstruction replaces"),
        "ablated": Option(
            "replaced", ("replaced", *POLICIES), "tokens that are ablated: by default the same"
        ),
        "head": Option(
            "auto",
            ("auto", "linear", "probe"),
            "linear: every backbone by a linear head, published or fitted; probe: by a fitted one",
        ),
        "names": Option("default", doc="which names of the classes a zero-shot head reads"),
    }
    metrics = (
        Metric("loss_clean", "nat", "none", _POSITIVE, _BOOT, "mean cross-entropy, untouched"),
        Metric("loss_spliced", "nat", "lower", _POSITIVE, _BOOT, "with x̂ in the place of x"),
        Metric("loss_zero", "nat", "none", _POSITIVE, _BOOT, "with 0 in the place of x"),
        Metric("loss_mean", "nat", "none", _POSITIVE, _BOOT, "with the train mean in its place"),
        Metric("loss_increase", "nat", "lower", _ANY, _BOOT, "loss_spliced − loss_clean"),
        Metric(
            "loss_recovered",
            "1",
            "higher",
            _ANY,
            _BOOT,
            "(loss_zero − loss_spliced) / (loss_zero − loss_clean), ratio of means",
        ),
        Metric("loss_recovered_mean", "1", "higher", _ANY, _BOOT, "the same with loss_mean"),
        Metric("accuracy_clean", "1", "none", _SHARE, _BOOT, "top-1"),
        Metric("accuracy_spliced", "1", "higher", _SHARE, _BOOT, "top-1"),
        Metric("accuracy_zero", "1", "none", _SHARE, _BOOT, "top-1"),
        Metric("accuracy_mean", "1", "none", _SHARE, _BOOT, "top-1"),
        Metric("accuracy_top5_clean", "1", "none", _SHARE, _BOOT, "top-5"),
        Metric("accuracy_top5_spliced", "1", "higher", _SHARE, _BOOT, "top-5"),
        Metric("accuracy_top5_zero", "1", "none", _SHARE, _BOOT, "top-5"),
        Metric("accuracy_top5_mean", "1", "none", _SHARE, _BOOT, "top-5"),
        Metric("agreement_spliced", "1", "higher", _SHARE, _BOOT, "the clean pass's top-1"),
        Metric("agreement_zero", "1", "none", _SHARE, _BOOT, "the clean pass's top-1"),
        Metric("agreement_mean", "1", "none", _SHARE, _BOOT, "the clean pass's top-1"),
        Metric("kl_spliced", "nat", "lower", _POSITIVE, _BOOT, "mean KL(clean ‖ spliced)"),
        Metric("kl_zero", "nat", "none", _POSITIVE, _BOOT, "mean KL(clean ‖ zero)"),
        Metric("kl_mean", "nat", "none", _POSITIVE, _BOOT, "mean KL(clean ‖ mean)"),
        Metric("embedding_cosine_spliced", "1", "higher", (-1, 1), _BOOT, "mean e·ê / (‖e‖ ‖ê‖)"),
        Metric("embedding_cosine_zero", "1", "none", (-1, 1), _BOOT, "mean e·ê / (‖e‖ ‖ê‖)"),
        Metric("embedding_cosine_mean", "1", "none", (-1, 1), _BOOT, "mean e·ê / (‖e‖ ‖ê‖)"),
        Metric("embedding_nmse_spliced", "1", "lower", _POSITIVE, _BOOT, "Σ‖ê − e‖² / Σ‖e − ē‖²"),
        Metric("embedding_nmse_zero", "1", "none", _POSITIVE, _BOOT, "Σ‖ê − e‖² / Σ‖e − ē‖²"),
        Metric("embedding_nmse_mean", "1", "none", _POSITIVE, _BOOT, "Σ‖ê − e‖² / Σ‖e − ē‖²"),
        Metric("ce_recovered", "1", "higher", doc=_PEERS),
        Metric("frac_recovered", "1", "higher", doc=_PEERS),
        Metric("ce_loss_score", "1", "higher", doc=_PEERS),
        Metric("kl_div_score", "1", "higher", doc=_PEERS),
        Metric("score", "1", "lower", doc=_PEERS),
    )

    @classmethod
    def canonical(cls, options: Mapping[str, str], *, conventions: bool) -> Mapping[str, str]:
        """The tokens' names once each; the peers say themselves which tokens they mean."""
        usual = {name: cls.options[name].default for name in ("replaced", "ablated")}
        if conventions:
            return {**options, **usual}
        same = options["ablated"] == options["replaced"]
        return {**options, "ablated": "replaced"} if same else options

    def start(self, ctx: Context) -> None:
        self.ctx, self.readouts = ctx, list(ctx.readouts)
        chosen = {name: option.default for name, option in self.options.items()} | {**ctx.options}
        self.replaced = chosen["replaced"]
        same = chosen["ablated"] == "replaced"
        self.ablated = self.replaced if same else chosen["ablated"]
        self.head, self.names = chosen["head"], chosen["names"]
        if ctx.conventions:
            from saebench.peer_scores import PeerScores

            self.peers = PeerScores(ctx, self._unseen, self.head)
            self.parts = self.peers.parts
        else:
            self._start_ours()

    def _start_ours(self) -> None:
        from saebench.metrics import ImageSums, Total
        from saebench.metrics.spread import Spread
        from saebench.metrics.substitution import EMBEDDING_TERMS, PASSES, TERMS
        from saebench.retrieval import Blocks

        self.unseen = {reads: self._of_passes(reads) for reads in ("any", "embedding", "features")}
        self.run: Any = [name for name in PASSES if not self.unseen["any"][name]]
        self.captions: Any = self.ctx.captions
        self.sums = {name: ImageSums(len(self.readouts), len(TERMS)) for name in PASSES}
        self.embeddings = {name: ImageSums(1, len(EMBEDDING_TERMS)) for name in PASSES[1:]}
        self.paired = {name: ImageSums(1, len(TERMS)) for name in PASSES}
        self.spread, self.left_out, self.blocks = Spread(), Total(), Blocks()
        self.pilot: Any = None
        self.parts = {f"readouts_{name}": part for name, part in self.sums.items()}
        self.parts |= {f"embedding_{name}": part for name, part in self.embeddings.items()}
        self.parts["spread"] = self.spread
        if self.captions is not None:
            self.parts |= {f"paired_{name}": part for name, part in self.paired.items()}
            self.parts["left_out"] = self.left_out

    def _of_passes(self, reads: Any) -> dict[str, str]:
        """Pass -> why nothing can be said of it, by what is read; '' where it can."""
        ablated = self._unseen(self.ablated, reads, ablating=True)
        return {
            "clean": "",
            "spliced": self._unseen(self.replaced, reads),
            "zero": ablated,
            "mean": ablated,
        }

    def _unseen(self, policy: str, reads: Any, *, ablating: bool = False) -> str:
        """Why nothing can be said of replacing these tokens; '' where it can."""
        seen = self.ctx.sees(policy, reads)
        if seen is None:
            return f"the site {self.ctx.site} has no tokens '{policy}'"
        if not seen:
            what = _READ[reads if self.ctx.sees(policy) else "any"]
            return f"vacuous: {what} cannot change with the tokens '{policy}'"
        return "" if ablating else self.ctx.refused(policy)

    def update(self, batch: Batch) -> None:
        from saebench.passes import Passes

        if self.ctx.conventions:
            self.peers.update(batch)
            return
        policies = {"replaced": self.replaced, "ablated": self.ablated}
        passes = Passes.of(batch, self.ctx, self.run, **policies)
        for one in passes.done if self.readouts else ():
            self.sums[one.name].add(passes.sums(one))
        self._add_embeddings(batch, passes)
        if self.captions is not None:
            embeddings = {one.name: one.output.embedding_bd for one in passes.done}
            for block in self.blocks.add(batch.first, embeddings, batch.weights_br):
                self._add_block(block)

    def _add_embeddings(self, batch: Batch, passes: Passes) -> None:
        clean, *others = passes.done
        if self.pilot is None:  # the first image of the segment
            self.pilot = clean.output.embedding_bd[0].double(), f"image {batch.first}"
        pilot_d, name = self.pilot
        self.spread.add(pilot_d.cpu().numpy(), passes.spread(pilot_d, name))
        for one in others:
            self.embeddings[one.name].add(passes.embedding_sums(one))

    def _add_block(self, block: Block) -> None:
        from saebench.metrics import Contracted
        from saebench.metrics.substitution import paired_terms

        for name, embedding_md in block.embeddings.items():
            terms_mq = paired_terms(*self.captions.pairs(embedding_md, block.places))
            self.paired[name].add(Contracted.of(terms_mq[None], block.weights_mr))

    def state(self) -> dict[str, np.ndarray]:
        """All parts. No block of images goes beyond a segment, so that its last ends here."""
        if self.ctx.conventions:
            self.peers.flush()
            return super().state()
        for block in self.blocks.flush(self.ctx.n_images):
            self._add_block(block)
        self.left_out.add(self.blocks.left_out, 0)
        self.blocks.left_out = 0
        return super().state()

    # --- rows --------------------------------------------------------------------------------

    def results(self) -> Iterator[Measurement]:
        yield from self._conventions() if self.ctx.conventions else self._ours()

    def _ours(self) -> Iterator[Measurement]:
        from saebench.metrics.substitution import PAIRED, embedding_values, values

        same, of_embedding = self.replaced == self.ablated, self.unseen["embedding"]
        for i, readout in enumerate(self.readouts):
            unseen, n_classes = self.unseen[readout.reads], readout.n_classes
            found = values(self.sums, i, unseen, same_tokens=same, n_classes=n_classes)
            notes = {"loss_clean": readout.note}
            yield from self._measurements(found, readout.columns, readout.variant, notes)
        found = embedding_values(self.embeddings, self.spread, of_embedding, same_tokens=same)
        yield from self._measurements(found)
        if self.captions is not None:
            left = int(self.left_out.sum)
            note = f"{left} images of a last block that is not whole are left out" if left else ""
            found = values(self.paired, 0, of_embedding, same_tokens=same, only=PAIRED)
            notes, captions = dict.fromkeys(PAIRED, note), self.captions
            yield from self._measurements(found, captions.columns, captions.variant, notes)

    def _measurements(
        self,
        found: Iterator[Any],
        columns: Mapping[str, str] = _NONE,
        variant: Mapping[str, str] = _NONE,
        notes: Mapping[str, str] = _NONE,  # of metrics
    ) -> Iterator[Measurement]:
        from saebench.peer_scores import foreign_tokens

        tokens = {"replaced": self.replaced, "ablated": self.ablated}
        for one in found:
            spliced = "spliced" in one.passes and one.value is not None
            foreign = foreign_tokens(self.ctx, self.replaced) if spliced else ""
            texts = (one.note, foreign, notes.get(one.metric, ""))
            yield Measurement(
                one.metric,
                one.value,
                n=one.n,
                variant={**variant, **self._of_tokens(), **self._of_head()},
                columns={**columns, **tokens, "last_block": self.ctx.last_block},
                replicates=one.replicates,
                note="; ".join(filter(None, texts)),
            )

    def _of_tokens(self) -> dict[str, str]:
        """Which tokens are meant, where that is not the default."""
        found = {"replaced": self.replaced} if self.replaced != "sae_tokens" else {}
        return found | ({"ablated": self.ablated} if self.ablated != self.replaced else {})

    def _of_head(self) -> dict[str, str]:
        """How the embedding is made and read, where that is not the default."""
        usual = {"names": "default", "last_block": "full"}
        found = {"names": self.names, "last_block": self.ctx.last_block}
        found = {key: value for key, value in found.items() if value != usual[key]}
        if self.head != "auto":  # the head that was found
            heads = (readout.columns.get("head", self.head) for readout in self.readouts)
            found["head"] = next(heads, self.head)
        return found

    def _conventions(self) -> Iterator[Measurement]:
        for one in self.peers.scores():
            tokens = {"replaced": one.tokens, "ablated": one.tokens}
            columns = one.readout.columns if one.readout else {}
            yield Measurement(
                one.metric,
                one.value,
                n=one.n,
                variant={"convention": one.project, **self._of_head()},
                columns={**columns, **tokens, "last_block": self.ctx.last_block},
                note=one.note,
            )
