"""The peers' scores of a substitution in a run: their passes, and the losses of every image.

They replace and ablate every token of a site, hugofry and patchsae the CLS token alone, whatever
the options of a run say. `saebench.metrics.substitution_conventions` has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.metrics import Total
from saebench.metrics.substitution import TERMS
from saebench.metrics.substitution_conventions import (
    CONVENTIONS,
    READS,
    PerImage,
    contrastive_losses,
    peer_value,
)
from saebench.passes import Passes, PassName
from saebench.readouts import Readout
from saebench.retrieval import Block, Blocks
from saebench.task import Batch, Context

_PASSES: tuple[PassName, ...] = ("clean", "spliced", "zero")


@dataclass(frozen=True)
class PeerScore:
    """One project's score over n images, or None and the reason.

    readout: the head that it reads; tokens: the policy of what is replaced and ablated.
    """

    metric: str
    project: str
    value: float | None
    n: int
    readout: Readout | None
    tokens: str
    note: str


def foreign_tokens(ctx: Context, policy: str) -> str:
    """Which tokens of a policy an SAE was not trained on; '' for none."""
    tokens = ctx.foreign(policy)
    if not tokens:
        return ""
    return f"it was not trained on these of the replaced tokens: {', '.join(tokens)}"


class PeerScores:
    """What the formulas of the peers need of the batches of one SAE.

    unseen: policy, what is read -> why nothing can be said of replacing these tokens, '' where it
    can. head: the task's option.
    """

    def __init__(self, ctx: Context, unseen: Callable[[str, str], str], head: str) -> None:
        self.ctx, self.head, self.readouts = ctx, head, list(ctx.readouts)
        bare = self._zero_shot(texts="names", temperature="1")
        default = self.readouts[0] if self.readouts else None
        self.heads: Mapping[str, Readout | None] = {
            "default": default,
            "bare": bare or default,
            "kl": default,
            "contrastive": self._zero_shot(texts="names", temperature="model"),
        }
        self.bare = bare is not None
        self.why = {reads: self._why(reads, unseen) for reads in READS}
        self.terms = {reads: PerImage() for reads in READS}
        self.blocks, self.left_out = Blocks(), Total()
        self.parts = {**self.terms, "left_out": self.left_out}

    def _zero_shot(self, **columns: str) -> Readout | None:
        wanted = {"loss": "zero_shot_ce", **columns}.items()
        return next((r for r in self.readouts if wanted <= dict(r.columns).items()), None)

    def _why(self, reads: str, unseen: Callable[[str, str], str]) -> str:
        """Why there is no score of these losses; '' where there is one."""
        head = self.heads[reads]
        if not self.readouts:
            return "the classes of the dataset have no names, and so no head"
        if head is None and self.head != "auto":
            return f"it needs a text tower, and another head is read here: {self._other()}"
        if head is None:
            return "it needs a text tower: a label's text for each image"
        return unseen("cls" if reads == "contrastive" else "all", head.reads)

    def _other(self) -> str:
        """The head that the task's option asks for."""
        return f"head={self.readouts[0].columns.get('head', self.head)}"

    def update(self, batch: Batch) -> None:
        if read := [reads for reads in ("default", "bare", "kl") if not self.why[reads]]:
            self._read(read, batch)
        if not self.why["contrastive"]:
            passes = Passes.of(batch, self.ctx, _PASSES, replaced="cls", ablated="cls")
            i = self.readouts.index(self.heads["contrastive"])
            logits = {one.name: passes.logits(one, i) for one in passes.done}
            labels = {"labels": torch.as_tensor(batch.labels, device=logits["clean"].device)}
            self._add(self.blocks.add(batch.first, {**logits, **labels}, batch.weights_br))

    def _read(self, read: Sequence[str], batch: Batch) -> None:
        """Losses of READS with every token replaced."""
        passes = Passes.of(batch, self.ctx, _PASSES, replaced="all", ablated="all")
        terms: dict[int, Tensor] = {}  # readout -> [b passes q]
        for reads in read:
            i = self.readouts.index(self.heads[reads])
            if i not in terms:
                terms[i] = torch.stack([passes.terms(one, i) for one in passes.done], dim=1)
            term = TERMS.index("kl" if reads == "kl" else "loss")
            self.terms[reads].add(batch.places, terms[i][:, :, term])

    def _add(self, blocks: list[Block]) -> None:
        for block in blocks:
            *logits, labels_m = block.embeddings.values()
            losses: list[Tensor] = [contrastive_losses(logits_mc, labels_m) for logits_mc in logits]
            self.terms["contrastive"].add(block.places, torch.stack(losses, dim=1))

    def flush(self) -> None:
        """At the end of a segment."""
        self._add(self.blocks.flush(self.ctx.n_images))
        self.left_out.add(self.blocks.left_out, 0)
        self.blocks.left_out = 0

    def scores(self) -> Iterator[PeerScore]:
        for (metric, project), convention in CONVENTIONS.items():
            reads = convention.reads
            images, head, why = self.terms[reads], self.heads[reads], self.why[reads]
            value, note = peer_value(convention, images)
            foreign = foreign_tokens(self.ctx, convention.tokens) if value is not None else ""
            other = self._instead() if reads == "bare" and value is not None else ""
            note = why or "; ".join(filter(None, (note, other, foreign)))
            n = len(images.places_n)
            yield PeerScore(metric, project, value, n, head, convention.tokens, note)

    def _instead(self) -> str:
        """Which head is read where the project has bare names at temperature 1."""
        if self.bare:
            return ""
        if self.head != "auto":
            return f"of another head than the project's: {self._other()}"
        return "of the default head, for there is no text tower"
