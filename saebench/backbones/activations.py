"""Checks that a model was built with the activation function that its weights were trained with.

OpenAI's CLIP weights are QuickGELU, x·sigmoid(1.702 x); loaded into a model with the exact GELU
they run without a word, and every number is wrong.
"""

from __future__ import annotations

from torch import nn

from saebench.errors import SpecError
from saebench.specs import BackboneSpec

_NAMES = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "Hardswish": "hard_swish",
    "HardSwish": "hard_swish",
    "HardSwishMe": "hard_swish",
    "SiLU": "silu",
    "Swish": "silu",
    "SwishMe": "silu",
}

_GELUS = {"gelu", "gelu_tanh", "quick_gelu"}

# MobileNetV3 computes with ReLU in its early blocks, and in what weights its channels.
_BESIDE = {"hard_swish": {"relu"}}


def activations_of(tower: nn.Module) -> set[str]:
    """The activation functions among a model's modules, by their names in `BackboneSpec`."""
    found = set()
    for module in tower.modules():
        name = _NAMES.get(type(module).__name__)
        if name == "gelu" and getattr(module, "approximate", "none") == "tanh":
            name = "gelu_tanh"
        if name is not None:
            found.add(name)
    return found


def check_activation(spec: BackboneSpec, tower: nn.Module) -> None:
    """Errors: SpecError where the built model has another activation function than declared."""
    if spec.activation is None:
        return
    found = activations_of(tower)
    if spec.activation in found and found <= {spec.activation, *_BESIDE.get(spec.activation, ())}:
        return
    hint = "build the model with the activation its weights were trained with"
    if spec.activation in found or not found:
        hint = "leave activation out: it is checked where a model has one that is known"
    elif not found & _GELUS:  # the architecture's own, which no weights change
        hint = f'write activation = "{sorted(found)[0]}"; a text tower\'s is not asked for'
    elif spec.loader == "open_clip" and spec.activation == "quick_gelu":
        hint = "take the '-quickgelu' name of the model, or model_args.force_quick_gelu = true"
    elif spec.loader == "timm":
        hint = f'model_args.act_layer = "{spec.activation}", or a model name that says so'
    raise SpecError(
        f"{spec.path or spec.name}: activation = '{spec.activation}', and "
        f"'{spec.model}' is built with {', '.join(sorted(found)) or 'none that is known'}",
        hint,
    )
