"""The passes of a substitution over one batch: outputs, and what each says of each image.

    clean      untouched
    spliced    the reconstruction in the place of x
    zero, mean an ablation in its place

What does not depend on the SAE, the clean pass and the ablations, is computed once per batch for
all SAEs: under a key that names the pass, the site, the tokens and the readout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from saebench.errors import DataError, SaebenchError
from saebench.finite import all_finite
from saebench.metrics import Contracted
from saebench.metrics.spread import spread_terms
from saebench.metrics.substitution import Prediction, embedding_terms, image_terms
from saebench.readouts import Readout, ZeroShot
from saebench.task import Batch, Context

PassName = Literal["clean", "spliced", "zero", "mean"]


@dataclass(frozen=True)
class Pass:
    """An output, and where it comes from: '' where that is the SAE."""

    name: PassName
    output: Any
    at: str
    cosines: dict[int, Tensor] = field(default_factory=dict, repr=False)  # by texts


@dataclass(frozen=True)
class Passes:
    """One batch, of one SAE. The first of `done` is the clean pass."""

    batch: Batch
    readouts: Sequence[Readout]
    done: Sequence[Pass]

    @classmethod
    def of(
        cls, batch: Batch, ctx: Context, names: Iterable[PassName], *, replaced: str, ablated: str
    ) -> Passes:
        """Run the passes of these names. replaced, ablated: policies.

        Errors: SaebenchError where an output is NaN or infinite; those of `SaeBatch`.
        """
        done = []
        for name in names:
            if name == "clean":
                one = Pass(name, batch.clean_output, f"clean {batch.clean_name}")
            elif name == "spliced":
                one = Pass(name, batch.spliced_output(replaced), "")
            else:
                at = f"{name} {ablated} of {ctx.tokens} at {ctx.site}"
                one = Pass(name, batch.ablated_output(name, ablated), at)
            if not all_finite(one.output.embedding_bd):
                raise SaebenchError(
                    f"the embedding of the {name} pass is NaN or infinite near image "
                    f"{batch.ids[0]}",
                    "try --dtype float32, and look at what takes the place of the activations",
                )
            done.append(one)
        return cls(batch, ctx.readouts, done)

    def terms(self, one: Pass, i: int) -> Tensor:
        """[b q] float64: the `substitution.TERMS` of each image for readout i.

        Errors: DataError for a label that the readout has no class for; SaebenchError.
        """

        def predict() -> Prediction:
            return Prediction.of(self.logits(self.done[0], i))

        def compute() -> Tensor:
            clean: Prediction = self._once(self.done[0], f"prediction of readout {i}", predict)
            logits_bc = clean.logits_bc if one.name == "clean" else self.logits(one, i)
            return image_terms(logits_bc, self._labels(logits_bc), clean)

        return self._once(one, f"terms of readout {i}", compute)

    def sums(self, one: Pass) -> Contracted:
        """The terms of all readouts, [g b q], added over the images and each replicate."""

        def compute() -> Contracted:
            terms = [self.terms(one, i) for i in range(len(self.readouts))]
            return Contracted.of(torch.stack(terms), self.batch.weights_br)

        return self._once(one, "sums of all readouts", compute)

    def embedding_sums(self, one: Pass) -> Contracted:
        """The `substitution.EMBEDDING_TERMS` of the pass against the clean one, [1 b q], added."""

        def compute() -> Contracted:
            clean_bd, other_bd = self.done[0].output.embedding_bd, one.output.embedding_bd
            return Contracted.of(embedding_terms(clean_bd, other_bd)[None], self.batch.weights_br)

        return self._once(one, "embedding", compute)

    def spread(self, pilot_d: Tensor, name: str) -> Contracted:
        """Sums of the clean embedding around a pilot of this name."""
        clean_bd, weights_br = self.done[0].output.embedding_bd, self.batch.weights_br
        return self.batch.shared_by_all(
            _key(f"embedding around {name}", self.done[0].at),
            lambda: spread_terms(clean_bd, pilot_d, weights_br),
        )

    def logits(self, one: Pass, i: int) -> Tensor:
        """[b c] float64 of readout i. Errors: SaebenchError where they are NaN or infinite."""
        logits_bc = self._logits(one, self.readouts[i])
        if not all_finite(logits_bc):
            raise SaebenchError(
                f"the logits of the {one.name} pass are NaN or infinite near image "
                f"{self.batch.ids[0]}",
                "try --dtype float32, and look at what takes the place of the activations",
            )
        return logits_bc

    def _logits(self, one: Pass, readout: Readout) -> Tensor:
        """Of the same texts at several temperatures the cosines are taken once: they cost most."""
        if not isinstance(readout, ZeroShot):
            return readout.logits(one.output)
        texts = id(readout.text_cd)
        if texts not in one.cosines:
            one.cosines[texts] = readout.cosines(one.output)
        return readout.scale * one.cosines[texts]

    def _labels(self, logits_bc: Tensor) -> Tensor:
        labels, n_classes = self.batch.labels, logits_bc.shape[1]
        if not 0 <= labels.min() <= labels.max() < n_classes:
            raise DataError(
                f"the labels of the images go from {labels.min()} to {labels.max()}, and the head "
                f"tells {n_classes} classes apart",
                "the classes of the head have to be those of the dataset, in its order",
            )
        return torch.as_tensor(labels, device=logits_bc.device)

    def _once(self, one: Pass, what: str, compute: Callable[[], Any]) -> Any:
        return self.batch.shared_by_all(_key(what, one.at), compute) if one.at else compute()


def _key(what: str, which: object) -> str:
    return f"loss_substitution: {what}: {which}"
