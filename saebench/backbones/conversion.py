"""Checkpoints as their makers release them, turned into the names and shapes of the model.

By the library's own functions, in the library's own order, so that a file means here what it means
there: `timm.create_model(pretrained=True)`, `open_clip.create_model(pretrained=path)`. What is left
over must fit exactly (`saebench.backbones.checkpoint.fit_to`), except for tensors that are dropped
here by name:
- a classifier's, where the model was built without one (`num_classes = 0`): timm does the same;
- OpenAI's `input_resolution`, `context_length`, `vocab_size`, which are settings, not weights;
- `position_ids`, the numbers 0, 1, 2, … that older versions of transformers saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from saebench.backbones.resampling import open_clip_notes, watched
from saebench.errors import WeightsError
from saebench.specs import BackboneSpec

Tensors = dict[str, Tensor]

# What the libraries raise for a file of another model.
_FAILS = (LookupError, RuntimeError, ValueError, AssertionError, TypeError, AttributeError)


def converted(
    module: nn.Module, spec: BackboneSpec, tensors: Tensors, path: Path
) -> tuple[Tensors, list[str]]:
    """The tensors of a checkpoint under the names, and in the shapes, of the module; and notes.

    `tensors`: as they are stored. The notes say which values are resampled, from what to what.
    Errors: WeightsError where the library cannot convert them, or would resample its patches.
    """
    from timm.models import clean_state_dict

    tensors = clean_state_dict(tensors)  # without the prefixes of DDP and torch.compile
    try:
        if spec.loader == "timm":
            with watched(path) as notes:
                return _timm(module, tensors), notes
        if spec.loader == "open_clip":
            return _open_clip(module, tensors)
    except _FAILS as error:
        raise WeightsError(
            f"{path} does not fit the model: {spec.loader} cannot convert it "
            f"({type(error).__name__}: {error})",
            "are model and model_args those that the weights were trained with?",
        ) from error
    return tensors, []


def _timm(module: nn.Module, tensors: Tensors) -> Tensors:
    from saebench.backbones.timm_build import checkpoint_filter

    if convert := checkpoint_filter(module):
        tensors = convert(tensors, module)
    own = module.state_dict()
    surplus = [name for name in classifier_names(module) if name not in own]
    return {name: tensor for name, tensor in tensors.items() if name not in surplus}


def float32(tensor: Tensor) -> Tensor:
    """Floats of any width as float32; integers as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def classifier_names(module: nn.Module) -> list[str]:
    """The names that the tensors of a timm model's classifier have, or would have."""
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    return [f"{head}.{part}" for head in heads for part in ("weight", "bias")]


def _open_clip(module: nn.Module, tensors: Tensors) -> tuple[Tensors, list[str]]:
    """As open_clip.factory.load_checkpoint, which reads and loads in one, and so shows no keys.

    Unlike there a missing `logit_bias` is not made up: it would be an error of the file.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import (
        convert_to_custom_text_state_dict,
        resize_pos_embed,
        resize_text_pos_embed,
    )

    model: Any = module
    # Half precision it cannot resample on a CPU.
    tensors = {name: float32(tensor) for name, tensor in tensors.items()}
    tensors = dict(convert_state_dict(model, tensors))
    if "positional_embedding" in tensors and not hasattr(model, "positional_embedding"):
        tensors = dict(convert_to_custom_text_state_dict(tensors))
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name, None)
        if name in tensors and own is not None and own.ndim != tensors[name].ndim:
            tensors[name] = tensors[name].reshape(own.shape)
    known = model.state_dict()
    for name in (
        "input_resolution",
        "context_length",
        "vocab_size",
        "text.transformer.embeddings.position_ids",
    ):
        if name not in known:
            tensors.pop(name, None)
    notes = open_clip_notes(tensors, known)
    resize_pos_embed(tensors, model)
    resize_text_pos_embed(tensors, model)
    return tensors, notes
