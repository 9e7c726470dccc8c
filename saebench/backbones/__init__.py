"""Backbones: vision models with named sites, over timm, open_clip, and a user's own loader.

backbone = load_backbone(spec)                       # device="cpu", dtype=torch.float32
images_b3hw = torch.stack([backbone.transform(image) for image in images])
captures = backbone.acts(images_b3hw, ["blocks.2"])
output = backbone.resume("blocks.2", reconstruction_btd, captures["blocks.2"].state)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from saebench.backbones.activations import check_activations
from saebench.backbones.backbone import Backbone, Capture, LastBlock
from saebench.backbones.checkpoint import load_weights
from saebench.backbones.checks import check_entry
from saebench.backbones.factory import user_function
from saebench.backbones.influence import Reads
from saebench.backbones.steps import Output, Step, SteppedModel, TextTower
from saebench.errors import SpecError, UsageError
from saebench.specs import BackboneSpec

__all__ = [
    "Backbone",
    "Capture",
    "Output",
    "Reads",
    "Step",
    "SteppedModel",
    "TextTower",
    "build_module",
    "load_backbone",
    "stepped",
]

_LOADERS = ("timm", "open_clip")


def load_backbone(
    spec: BackboneSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    last_block: LastBlock = "full",
) -> Backbone:
    """Build the model of an entry, load its weights, and check the one against the other.

    Errors: SpecError (the entry says what the model is not), WeightsError (no file, not the one
    that the entry describes, or not of this model), UsageError (no such device).
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device = '{device}': torch sees no GPU here", "use --device cpu")
    made = build_module(spec)
    if isinstance(made, Backbone):
        made.last_block = last_block
        return made
    module = made.module if isinstance(made, SteppedModel) else made
    loaded = load_weights(module, spec)
    if loaded.sha256 is None and spec.loader in _LOADERS:
        raise SpecError(
            f"{spec.path or spec.name}: there are no weights",
            'write  [weights]  with  file = "…"  or  hub = "owner/name"',
        )
    # After the weights: what is read of them, such as the logit scale, is then theirs.
    model = made if isinstance(made, SteppedModel) else stepped(module, spec)
    check_entry(spec, model)
    check_activations(spec, model)
    return Backbone(
        spec,
        model,
        device=device,
        dtype=dtype,
        weights_sha256=loaded.sha256,
        notes=loaded.notes,
        last_block=last_block,
    )


def build_module(spec: BackboneSpec) -> nn.Module | SteppedModel | Backbone:
    """What an entry's loader makes: an architecture with random weights, for timm and open_clip.

    Errors: SpecError.
    """
    if spec.loader == "timm":
        from saebench.backbones import timm_build

        return timm_build.build(spec)
    if spec.loader == "open_clip":
        from saebench.backbones import open_clip_build

        return open_clip_build.build(spec)
    if ":" not in spec.loader:
        raise SpecError(
            f"{spec.path or spec.name}: there is no loader '{spec.loader}'",
            f"use {', '.join(_LOADERS)}, or a function of your own: package.module:function",
        )
    made = user_function(spec)(spec)
    if not isinstance(made, (nn.Module, SteppedModel, Backbone)):
        raise SpecError(
            f"{spec.path or spec.name}: '{spec.loader}' returned a {type(made).__name__}",
            "it must return a torch module, a SteppedModel or a Backbone",
        )
    return made


def stepped(module: nn.Module, spec: BackboneSpec) -> SteppedModel:
    """A module with its forward pass as steps. Errors: SpecError where that is not known here."""
    from saebench.backbones import open_clip_models, timm_models

    model = timm_models.stepped(module, spec.input.size) or open_clip_models.stepped(module, spec)
    if model is None:
        raise SpecError(
            f"{spec.path or spec.name}: the forward pass of '{spec.model}' "
            f"({type(module).__name__}) is not known here",
            f"known are timm's {_names(timm_models.KNOWN)} and open_clip's "
            f"{_names(open_clip_models.KNOWN)}; "
            "for another, write a loader that returns a saebench.backbones.SteppedModel",
        )
    return model


def _names(classes: Iterable[type]) -> str:
    return ", ".join(known.__name__ for known in classes)
