"""Text classifiers: class names put into templates, embedded, and averaged over the templates.

    w_c = unit( mean over templates t of unit(text tower(t with the name of c)) )

as Radford et al. (2021) and open_clip's `build_zero_shot_classifier` have it; the bare names are
the case of the one template `{}`. The logits of an image are scale · cos(image, w_c). With the
model's own scale that is the temperature it was trained at; a scale of 1 is temperature 1, at which
the loss of any model over 1,000 classes is close to ln 1000.

SigLIP was trained with a sigmoid for every pair, scale · cos + bias. Here its logits go through a
softmax over the classes at its own scale, as those of CLIP do; the bias is the same for all classes
and cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from saebench.errors import DataError, SpecError
from saebench.identity import content_hash
from saebench.readouts import ZeroShot, unit_norm
from saebench.text_embeddings import CHUNK, embedded, text_identity

if TYPE_CHECKING:
    from saebench.backbones import Backbone
    from saebench.data import Dataset
    from saebench.store import Store

BARE = ("{}",)
KIND = "text_classifier"  # of artifact


def zero_shot_readouts(
    backbone: Backbone, dataset: Dataset, store: Store, names: str
) -> list[ZeroShot]:
    """Templates and bare names, each at the model's own temperature and at 1.

    The first is the default: templates, or where there are none bare names, at the model's own
    temperature. names: a key of `Dataset.text_names`. Text classifiers come from the store.
    Errors: DataError (no class names, or none of that kind), SpecError (a template without {}),
    NonFiniteError.
    """
    called = class_texts(dataset, names)
    templates = templates_for(backbone, dataset)
    kinds = {"names": BARE} if templates in ((), BARE) else {"templates": templates, "names": BARE}
    default = next(iter(kinds))
    found = []
    for texts, sentences in kinds.items():
        text_cd = text_classifier(backbone, called, sentences, store)
        for temperature in ("model", "1"):
            columns = {
                "loss": "zero_shot_ce",
                "head": "zero_shot",
                "temperature": temperature,
                "texts": texts,
                "names": names,
            }
            usual: Mapping[str, str] = {"temperature": "model", "texts": default}
            variant = {key: columns[key] for key in usual if columns[key] != usual[key]}
            scale = backbone.logit_scale if temperature == "model" else 1.0
            found.append(ZeroShot(text_cd, scale, columns, variant))
    return found


def class_texts(dataset: Dataset, names: str) -> tuple[str, ...]:
    """[c] what the classes are called in texts. Errors: DataError."""
    kinds = dataset.text_names
    if not kinds:
        raise DataError(
            f"the dataset '{dataset.spec.name}' has no class names that a text tower could read",
            'name its classes in the entry,  classes = ["…", "…"]  in label order; or read every '
            "backbone by a linear head:  --option loss_substitution.head=linear",
        )
    if names not in kinds:
        raise DataError(
            f"the dataset '{dataset.spec.name}' has no class names of the kind '{names}'",
            f"it has: {', '.join(kinds)}",
        )
    return tuple(kinds[names])


def templates_for(backbone: Backbone, dataset: Dataset) -> tuple[str, ...]:
    """The backbone's own templates for a dataset, else the dataset's; empty where none has any.

    Errors: SpecError for one without {}, or an unknown set.
    """
    own = backbone.spec.head.templates.get(dataset.spec.name)
    templates = dataset.templates if own is None else own
    for template in templates:
        if "{}" not in template:
            spec = dataset.spec if own is None else backbone.spec
            raise SpecError(
                f"{spec.path or spec.name}: the template '{template}' has no place for a name",
                'write {} where the name of a class goes:  "a photo of a {}."',
            )
    return tuple(templates)


def text_classifier(
    backbone: Backbone, names: Sequence[str], templates: Sequence[str], store: Store
) -> torch.Tensor:
    """[c d] float64 of unit norm, one row a class; embedded once, and kept in the store."""
    fields = {
        **text_identity(backbone),
        "n_classes": len(names),
        "texts": content_hash({"names": list(names), "templates": list(templates)}),
    }
    artifact = store.get(KIND, fields, lambda: {"text_cd": _averaged(backbone, names, templates)})
    return unit_norm(torch.tensor(artifact.arrays["text_cd"], device=backbone.device))


def _averaged(backbone: Backbone, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """[c d] float32."""
    some = max(1, CHUNK // len(templates))  # classes at a time
    chunks = (
        [
            template.replace("{}", name)
            for name in names[first : first + some]
            for template in templates
        ]
        for first in range(0, len(names), some)
    )
    parts = []
    for text_nd in embedded(backbone, chunks, len(names) * len(templates)):
        by_class = text_nd.reshape(-1, len(templates), text_nd.shape[1])
        mean_cd = by_class.mean(axis=1, dtype=np.float64)
        parts.append((mean_cd / np.linalg.norm(mean_cd, axis=1, keepdims=True)).astype(np.float32))
    return np.concatenate(parts)
