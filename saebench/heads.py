"""Which head reads a backbone's final embedding, and what of it is part of a unit's identity.

    head_ce         the model's own classifier, its outputs that are the classes of the dataset
    zero_shot_ce    the text tower: class names put into templates, and bare names
    linear_head_ce  a linear head: the published one for these classes, else a probe that is fitted
                    once on clean train features

The entry decides (`HeadSpec`): a classifier without outputs for a dataset is read by a linear head
there. With `head = linear` every backbone is, so that their losses can be compared; with
`head = probe` by a probe, published head or not. `saebench.readouts` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from saebench.errors import WeightsError
from saebench.specs import BackboneSpec, DatasetSpec
from saebench.weights import HeadFile, weights_sha256

HeadInUse = Literal["classifier", "zero_shot", "published", "probe"]
HEADS = ("auto", "linear", "probe")  # values of a task's option `head`

PROBE = 2  # rises when a fitted probe could come out otherwise
PROBE_IMAGES = 50  # train images a class that a probe is fitted on


def head_in_use(spec: BackboneSpec, dataset: DatasetSpec, head: str = "auto") -> HeadInUse:
    """The head of a backbone on a dataset. `head`: one of HEADS."""
    if head == "auto" and spec.head.kind == "zero_shot":
        return "zero_shot"
    if head == "auto" and spec.head.kind == "classifier" and spec.head.outputs(dataset):
        return "classifier"
    return "published" if head != "probe" and spec.head.published(dataset) else "probe"


def said_once(
    spec: BackboneSpec, dataset: DatasetSpec, options: Mapping[str, str]
) -> dict[str, str]:
    """A task's options with `head` and `names` in one way of saying them.

    What chooses the head that is read anyway is `auto`; where there is no published head, `linear`
    is `probe`; where no text is read, names are the default.
    """
    said = dict(options)
    used = head_in_use(spec, dataset, said.get("head", "auto"))
    if "head" in said:
        usual = used == head_in_use(spec, dataset)
        said["head"] = "auto" if usual else "probe" if used == "probe" else "linear"
    if "names" in said and used != "zero_shot":
        said["names"] = "default"
    return said


def published_head(spec: BackboneSpec, dataset: DatasetSpec) -> HeadFile | None:
    """The file of the published linear head for the classes of a dataset; None: there is none."""
    name = spec.head.published(dataset)
    return HeadFile(spec, name) if name else None


def check_head(
    spec: BackboneSpec, dataset: DatasetSpec, task: str, options: Mapping[str, str]
) -> None:
    """Errors: WeightsError for a published head that is not here; it says how to go on without."""
    file = published_head(spec, dataset)
    if file is None or head_in_use(spec, dataset, options.get("head", "auto")) != "published":
        return
    try:
        weights_sha256(file)
    except WeightsError as error:
        hint = error.hint
        if "head" in options:
            hint += f"; or fit a probe instead:  --option {task}.head=probe"
        raise WeightsError(error.what, hint) from None


def readouts_identity(
    spec: BackboneSpec, dataset: DatasetSpec, n_probe: int, head: str = "auto"
) -> dict[str, Any]:
    """What of the readouts can change a number, beside `units.head_identity` and task options.

    Errors: WeightsError for a published head that is not here: its bytes are not known.
    """
    used = head_in_use(spec, dataset, head)
    fields: dict[str, Any] = {"head": used}
    if used in ("published", "probe"):
        fields["features"] = list(spec.head.features)
    if used == "published" and (file := published_head(spec, dataset)):
        fields["interleaved"] = spec.head.interleaved
        fields["weights"] = weights_sha256(file)
    if used == "probe":
        fields |= {"probe": PROBE, "n_images": n_probe}
    return fields
