"""Heads over the final embedding: from an `Output` to the logits of a dataset's classes.

    OwnHead     the outputs of the model's own classifier that are these classes
    ZeroShot    cosines with one text vector a class, times the model's scale or 1 (temperature)
    LinearHead  a linear layer over what a linear head reads of the backbone

Where a dataset has captions, `saebench.retrieval.Captions` is one more.

All compute in float64 from the float32 output, so that a loss does not depend on the batch.
`columns` are the typed columns that every row of a readout states; `variant` those of them that
tell it from the backbone's default readout, which is the first of the list; `reads` what of an
output it reads, and `note` what there is to say of it beside its clean loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from saebench.errors import DataError, Mismatch
from saebench.heads import HeadInUse, head_in_use

if TYPE_CHECKING:
    from saebench.backbones import Backbone, Output, Reads
    from saebench.data import Dataset
    from saebench.fit import Fit, Fitter
    from saebench.retrieval import Captions
    from saebench.units import Source


class Readout(Protocol):
    """b images, c classes."""

    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def variant(self) -> Mapping[str, str]: ...
    @property
    def n_classes(self) -> int: ...
    @property
    def reads(self) -> Reads: ...
    @property
    def note(self) -> str: ...
    def logits(self, output: Output) -> Tensor:
        """[b c] float64."""
        ...


@dataclass(frozen=True, eq=False)
class OwnHead:
    """The model's own classifier: the slice of its outputs that are the dataset's classes."""

    outputs: slice
    columns: Mapping[str, str] = field(
        default_factory=lambda: {"loss": "head_ce", "head": "classifier", "temperature": "model"}
    )
    variant: Mapping[str, str] = field(default_factory=dict)
    reads: Reads = "embedding"
    note: str = ""

    @property
    def n_classes(self) -> int:
        return self.outputs.stop - self.outputs.start

    def logits(self, output: Output) -> Tensor:
        assert output.logits_bc is not None
        return output.logits_bc[:, self.outputs].double()


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """scale · cos(image, text). text_cd: [c d] float64 of unit norm.

    A constant that a model adds to all logits (SigLIP's bias) cancels in a softmax over classes.
    """

    text_cd: Tensor
    scale: float
    columns: Mapping[str, str]
    variant: Mapping[str, str] = field(default_factory=dict)
    reads: Reads = "embedding"
    note: str = ""

    @property
    def n_classes(self) -> int:
        return self.text_cd.shape[0]

    def cosines(self, output: Output) -> Tensor:
        """[b c] float64: the same for every scale of the same texts."""
        return unit_norm(output.embedding_bd) @ self.text_cd.T

    def logits(self, output: Output) -> Tensor:
        return self.scale * self.cosines(output)


@dataclass(frozen=True, eq=False)
class LinearHead:
    """features @ W + b. W_dc [d c], b_c [c] float64.

    head: `published` or `probe`. features: what is read, as `HeadSpec.features` names it.
    """

    W_dc: Tensor
    b_c: Tensor
    head: HeadInUse
    features: Sequence[str] = ("embedding",)
    note: str = ""
    variant: Mapping[str, str] = field(default_factory=dict)
    reads: Reads = "features"

    @property
    def columns(self) -> Mapping[str, str]:
        fitted = {"solver": "logistic"} if self.head == "probe" else {}
        return {
            "loss": "linear_head_ce",
            "head": self.head,
            "temperature": "model",
            "feature": "+".join(self.features),
            **fitted,
        }

    @property
    def n_classes(self) -> int:
        return self.b_c.shape[0]

    def logits(self, output: Output) -> Tensor:
        return output.read_bd.double() @ self.W_dc + self.b_c


def unit_norm(embedding_bd: Tensor) -> Tensor:
    """Rows of length 1, in float64; a row of zeros stays as it is."""
    rows_bd = embedding_bd.double()
    return rows_bd / rows_bd.norm(dim=1, keepdim=True).clamp_min(1e-300)


@dataclass(frozen=True, eq=False)
class Readouts:
    """The readouts of one backbone on one dataset, the default first; captions where there are."""

    heads: Sequence[Readout]
    captions: Captions | None = None


def build_readouts(
    backbone: Backbone,
    dataset: Dataset,
    source: Source,
    fitter: Fitter,
    *,
    head: str = "auto",
    names: str = "default",
) -> Readouts:
    """The readouts of a backbone on a dataset; text classifiers and probes come from the store.

    head: one of `heads.HEADS`. names: a key of the dataset's `text_names`. Captions are read beside
    the default head alone: no other changes them. With captions, a text tower needs no class names:
    without any there is a warning, and no head.
    Errors: DataError (no class names, or none of that kind), SpecError, WeightsError (a head that
    is not of these classes).
    """
    used = head_in_use(backbone.spec, dataset.spec, head)
    if used == "classifier":
        outputs = backbone.spec.head.outputs(dataset.spec)
        assert outputs is not None
        heads: Sequence[Readout] = [_own_head(outputs, dataset, backbone)]
    elif used == "zero_shot":
        from saebench.zero_shot import class_texts, zero_shot_readouts

        try:
            class_texts(dataset, names)
        except DataError as error:
            if dataset.text_names or not dataset.has_captions:
                raise
            warnings.warn(f"no loss over classes: {error}", stacklevel=2)
            heads = []
        else:
            heads = zero_shot_readouts(backbone, dataset, fitter.store, names)
    else:
        from saebench.linear_head import linear_readout

        heads = [linear_readout(backbone, dataset, source, fitter, used)]
    captions = None
    if head == "auto" and backbone.spec.head.kind == "zero_shot" and dataset.has_captions:
        from saebench.retrieval import captions_of

        captions = captions_of(backbone, dataset, source, fitter.store)
    return Readouts(heads, captions)


def fits_ahead(
    backbone: Backbone, dataset: Dataset, *, head: str = "auto", names: str = "default"
) -> list[Callable[[], Fit]]:
    """What `build_readouts` will ask of a fitter, so that it can be fitted beside other things."""
    if head_in_use(backbone.spec, dataset.spec, head) != "probe":
        return []
    from saebench.linear_head import probe_of

    return [probe_of(backbone, dataset)]


def _own_head(outputs: slice, dataset: Dataset, backbone: Backbone) -> OwnHead:
    n, n_classes = outputs.stop - outputs.start, len(dataset.class_names)
    if n != n_classes:
        raise Mismatch(
            f"{backbone.spec.path or backbone.spec.name}: head.classes gives '{dataset.spec.name}' "
            f"{n:,} outputs, and the dataset has {n_classes:,} classes",
            "correct  head.classes = { NAME = [first, count] }; without it a probe is fitted",
        )
    return OwnHead(outputs)
