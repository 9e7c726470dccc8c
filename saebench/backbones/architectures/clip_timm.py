"""open_clip's TimmModel: an image tower that is a timm model, as in SigLIP and SigLIP 2.

visual.trunk, as steps of its own family | visual.head (pooling and projection, or nothing)
-> image embedding, not normalised
"""

from __future__ import annotations

from dataclasses import replace

from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from saebench.backbones import timm_models
from saebench.backbones.architectures.parts import below, each, one, within
from saebench.backbones.steps import Output, Step, SteppedModel


def timm_model(model: nn.Module, visual: TimmModel, size: int) -> SteppedModel | None:
    """The image tower `visual` of a model; None where the family of its trunk is not known."""
    made = timm_models.stepped(visual.trunk, size)
    if made is None:
        return None
    trunk = below("visual.trunk", made, module=model)

    def out(x: Tensor) -> Tensor:
        """What the trunk returns: where it keeps a classifier, this is the projection."""
        output = made.read(x)
        return output.embedding_bd if output.logits_bc is None else output.logits_bc

    # Without a classifier the trunk ends in an identity, which `read` leaves out.
    classifier = trunk.reads if made.n_classes > 0 else ()
    head = each(model, "visual.head") if len(visual.head) else (one(model, "visual.head"),)
    steps = (
        *within("visual.trunk", (*trunk.steps, Step(out, modules=classifier, starts=trunk.reads))),
        *head,
    )
    sites = {name: path for name, path in trunk.natural.items() if name != "pooled"}
    return replace(
        trunk,
        steps=within("visual", steps),
        read=Output,
        reads=(),
        tower=visual,
        n_classes=0,
        natural={**sites, "embedding": "visual"},
    )
