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
_LOSS, _KL = 1, 5  # places in `saebench.metrics.substitution.TERMS`


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

    def start(self, ctx: Context) -> None:
        self.ctx, self.readouts = ctx, list(ctx.readouts)
        chosen = {name: option.default for name, option in self.options.items()} | {**ctx.options}
        self.replaced = chosen["replaced"]
        same = chosen["ablated"] == "replaced"
        self.ablated = self.replaced if same else chosen["ablated"]
        self.head, self.names = chosen["head"], chosen["names"]
        if ctx.conventions:
            self._start_conventions()
        else:
            self._start_ours()

    def _start_ours(self) -> None:
        from saebench.metrics import ImageSums, Total
        from saebench.metrics.spread import Spread
        from saebench.metrics.substitution import EMBEDDING_TERMS, PASSES, TERMS
        from saebench.retrieval import Blocks

        self.unseen = {"clean": "", "spliced": self._unseen(self.replaced)}
        self.unseen |= dict.fromkeys(("zero", "mean"), self._unseen(self.ablated))
        self.run: Any = [name for name in PASSES if not self.unseen[name]]
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

    def _start_conventions(self) -> None:
        from saebench.metrics import Total
        from saebench.metrics.substitution_conventions import READS, PerImage
        from saebench.retrieval import Blocks

        self.bare = self._readout(texts="names", temperature="1")
        self.contrast = self._readout(texts="names", temperature="model")
        self.has_cls = self.ctx.sees("cls") is not None
        self.peers = {reads: PerImage() for reads in READS}
        self.blocks, self.left_out = Blocks(), Total()
        self.parts = {**self.peers, "left_out": self.left_out}

    def _readout(self, **columns: str) -> int | None:
        """Which readout is the zero-shot head of these columns."""
        wanted = {"loss": "zero_shot_ce", **columns}.items()
        found = (i for i, r in enumerate(self.readouts) if wanted <= dict(r.columns).items())
        return next(found, None)

    def _unseen(self, policy: str) -> str:
        """Why nothing can be said of replacing these tokens; '' where it can."""
        seen = self.ctx.sees(policy)
        if seen is None:
            return f"the site {self.ctx.site} has no tokens '{policy}'"
        return "" if seen else f"vacuous: the output cannot change with the tokens '{policy}'"

    def update(self, batch: Batch) -> None:
        from saebench.passes import Passes

        if self.ctx.conventions:
            self._update_conventions(batch)
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

    def _update_conventions(self, batch: Batch) -> None:
        import torch

        from saebench.passes import Passes

        names = ("clean", "spliced", "zero")
        if self.readouts:
            passes = Passes.of(batch, self.ctx, names, replaced="all", ablated="all")
            default, bare = (
                torch.stack([passes.terms(one, i) for one in passes.done], dim=1)
                for i in (0, self.bare or 0)
            )  # [b passes q]
            self.peers["default"].add(batch.places, default[:, :, _LOSS])
            self.peers["bare"].add(batch.places, bare[:, :, _LOSS])
            self.peers["kl"].add(batch.places, default[:, :, _KL])
        if self.contrast is not None and self.has_cls:
            passes = Passes.of(batch, self.ctx, names, replaced="cls", ablated="cls")
            logits = {one.name: passes.logits(one, self.contrast) for one in passes.done}
            labels = {"labels": torch.as_tensor(batch.labels, device=logits["clean"].device)}
            for block in self.blocks.add(batch.first, {**logits, **labels}, batch.weights_br):
                self._add_contrast(block)

    def _add_contrast(self, block: Block) -> None:
        import torch

        from saebench.metrics.substitution_conventions import contrastive_losses

        *logits, labels_m = block.embeddings.values()
        losses = [contrastive_losses(logits_mc, labels_m) for logits_mc in logits]
        self.peers["contrastive"].add(block.places, torch.stack(losses, dim=1))

    def state(self) -> dict[str, np.ndarray]:
        """All parts. No block of images goes beyond a segment, so that its last ends here."""
        add = self._add_contrast if self.ctx.conventions else self._add_block
        for block in self.blocks.flush(self.ctx.n_images):
            add(block)
        self.left_out.add(self.blocks.left_out, 0)
        self.blocks.left_out = 0
        return super().state()

    # --- rows --------------------------------------------------------------------------------

    def results(self) -> Iterator[Measurement]:
        yield from self._conventions() if self.ctx.conventions else self._ours()

    def _ours(self) -> Iterator[Measurement]:
        from saebench.metrics.substitution import PAIRED, embedding_values, values

        for i, readout in enumerate(self.readouts):
            found = values(
                self.sums,
                i,
                self.unseen,
                same_tokens=self.replaced == self.ablated,
                n_classes=readout.n_classes,
            )
            yield from self._measurements(found, readout.columns, readout.variant)
        found = embedding_values(
            self.embeddings, self.spread, self.unseen, same_tokens=self.replaced == self.ablated
        )
        yield from self._measurements(found, {}, {})
        if self.captions is not None:
            left = int(self.left_out.sum)
            note = f"{left} images of a last block that is not whole are left out" if left else ""
            found = values(
                self.paired, 0, self.unseen, same_tokens=self.replaced == self.ablated, only=PAIRED
            )
            yield from self._measurements(found, self.captions.columns, self.captions.variant, note)

    def _measurements(
        self,
        found: Iterator[Any],
        columns: Mapping[str, str],
        variant: Mapping[str, str],
        note: str = "",
    ) -> Iterator[Measurement]:
        columns = {**columns, "replaced": self.replaced, "ablated": self.ablated}
        variant = {**variant, **self._of_tokens(), **self._of_head(columns)}
        for one in found:
            foreign = self._foreign() if "spliced" in one.passes and one.value is not None else ""
            yield Measurement(
                one.metric,
                one.value,
                n=one.n,
                variant=variant,
                columns=columns,
                replicates=one.replicates,
                note="; ".join(text for text in (one.note, foreign, note) if text),
            )

    def _of_tokens(self) -> dict[str, str]:
        """Which tokens are meant, where that is not the default."""
        found = {"replaced": self.replaced} if self.replaced != "sae_tokens" else {}
        return found | ({"ablated": self.ablated} if self.ablated != self.replaced else {})

    def _of_head(self, columns: Mapping[str, str]) -> dict[str, str]:
        """How the embedding is made and read, where that is not the default."""
        usual = {"names": "default", "last_block": "full"}
        found = {"names": self.names, "last_block": self.ctx.last_block}
        found = {key: value for key, value in found.items() if value != usual[key]}
        if self.head != "auto":  # the head that was found, where there is one
            found["head"] = columns.get("head", self.head)
        return found

    def _foreign(self) -> str:
        """Which of the replaced tokens the SAE was not trained on."""
        own = tuple(self.ctx.kinds)
        replaced = {"sae_tokens": own, "all": tuple(self.ctx.site_kinds)}
        kinds = [k for k in replaced.get(self.replaced, (self.replaced,)) if k not in own]
        text = f"it was not trained on these of the replaced tokens: {', '.join(kinds)}"
        return text if kinds else ""

    def _conventions(self) -> Iterator[Measurement]:
        from saebench.metrics.substitution_conventions import CONVENTIONS, peer_value

        heads = {"default": 0, "kl": 0, "bare": self.bare or 0, "contrastive": self.contrast}
        for (metric, project), convention in CONVENTIONS.items():
            images = self.peers[convention.reads]
            value, note = peer_value(convention, images)
            if convention.reads == "contrastive" and not self.has_cls:
                note = f"the site {self.ctx.site} has no token 'cls'"
            elif convention.reads == "contrastive" and self.contrast is None:
                note = "it needs a text tower: a label's text for each image"
            head, tokens = heads[convention.reads], convention.tokens
            columns = self.readouts[head].columns if self.readouts and head is not None else {}
            yield Measurement(
                metric,
                value,
                n=len(images.places_n),
                variant={"convention": project, **self._of_head(columns)},
                columns={**columns, "replaced": tokens, "ablated": tokens},
                note=note,
            )
