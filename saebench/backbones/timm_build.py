"""Builds a timm model as an entry describes it, with random weights."""

from __future__ import annotations

from difflib import get_close_matches

import timm
from torch import nn

from saebench.errors import SpecError
from saebench.specs import BackboneSpec

# Weights come from [weights] only, where their hash is checked.
_RESERVED = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


def build(spec: BackboneSpec) -> nn.Module:
    """The timm model of an entry, with random weights. Errors: SpecError."""
    where = spec.path or spec.name
    for key in _RESERVED:
        if key in spec.model_args:
            raise SpecError(f"{where}: model_args.{key} is not used", "weights go under [weights]")
    if not timm.is_model(spec.model):
        name = spec.model.partition(".")[0]
        near = get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise SpecError(
            f"{where}: timm has no model '{spec.model}'", f"the nearest: {', '.join(near)}"
        )
    try:
        return timm.create_model(spec.model, pretrained=False, **spec.model_args)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise SpecError(
            f"{where}: timm cannot build '{spec.model}' with {dict(spec.model_args)}: {error}",
            f"see the arguments of timm's {spec.model.partition('.')[0]}",
        ) from error
