"""Which of open_clip's image towers are known as steps: a table of classes, and who knows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from saebench.backbones.architectures import clip_resnet, clip_timm, clip_vit
from saebench.backbones.architectures.parts import runs_as
from saebench.backbones.open_clip_text import ClipText
from saebench.backbones.steps import SteppedModel
from saebench.specs import BackboneSpec

# class of the image tower -> (model, tower, image size) -> the steps of the model, or None
KNOWN: dict[type[nn.Module], Callable[[nn.Module, Any, int], SteppedModel | None]] = {
    VisionTransformer: clip_vit.vision_transformer,
    ModifiedResNet: clip_resnet.modified_resnet,
    TimmModel: clip_timm.timm_model,
}


def stepped(model: Any, spec: BackboneSpec) -> SteppedModel | None:
    """An open_clip model as steps, or None where its image tower is not one of those known here."""
    visual = getattr(model, "visual", None)
    for known, steps in KNOWN.items():
        if isinstance(visual, nn.Module) and runs_as(visual, known, "forward"):
            made = steps(model, visual, spec.input.size)
            if made is None or not hasattr(model, "encode_text"):
                return made
            # A module of its own, or, in the first CLIP models, a transformer among the model's.
            tower = getattr(model, "text", None) or model.transformer
            return replace(made, text=ClipText(model, spec), text_tower=tower)
    return None
