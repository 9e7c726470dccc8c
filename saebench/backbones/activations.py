"""Checks that a model was built with the activation functions that its weights were trained with.

OpenAI's CLIP weights are QuickGELU, x·sigmoid(1.702 x); loaded into a model with the exact GELU
they run without a word, and every number is wrong. That holds for both towers: CLIP's ResNets have
ReLU in the image tower, whatever the name they are built by, and QuickGELU in the text tower.
"""

from __future__ import annotations

from torch import nn

from saebench.backbones.steps import SteppedModel
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


def check_activations(spec: BackboneSpec, model: SteppedModel) -> None:
    """Errors: SpecError where a tower has another activation function than the entry declares.

    Undeclared, the text tower of a zero-shot model has that of an image tower of tokens, a
    transformer too. Beside an image tower of another kind it has to be said.
    """
    where, built = spec.path or spec.name, image_activations(model)
    if spec.activation is not None and not _agree(spec.activation, built):
        raise SpecError(
            f"{where}: activation = '{spec.activation}', and '{spec.model}' is built with "
            f"{_names(built)}",
            _image_hint(spec, built),
        )
    if spec.text_activation is not None and model.text_tower is None:
        raise SpecError(
            f"{where}: text_activation = '{spec.text_activation}', and the model has no text tower",
            "leave it out; a loader of your own names one: SteppedModel(text_tower=…)",
        )
    if model.text_tower is None or (spec.text_activation is None and spec.head.kind != "zero_shot"):
        return
    texts = activations_of(model.text_tower)
    if spec.text_activation is None and model.grid is None:
        raise SpecError(
            f"{where}: text_activation is not said, and the image tower is no transformer that "
            "the text tower could be like",
            f"the text tower of '{spec.model}' is built with {_names(texts)}: are the weights? "
            "(OpenAI's are quick_gelu)",
        )
    wanted = spec.text_activation or spec.activation
    if wanted is not None and not _agree(wanted, texts):
        key = "text_activation" if spec.text_activation else "activation"
        raise SpecError(
            f"{where}: {key} = '{wanted}', and the text tower of '{spec.model}' is built with "
            f"{_names(texts)}",
            _text_hint(spec, wanted, texts),
        )


def image_activations(model: SteppedModel) -> set[str]:
    """The activation functions of what sees images, by their names in `BackboneSpec`."""
    return activations_of(model.tower or model.module)


def shown(spec: BackboneSpec, model: SteppedModel) -> str:
    """Which activation functions a model was built with, and which of them nobody declared."""
    undeclared = "" if spec.activation else " (not declared)"
    image = f"activation {_names(image_activations(model))}{undeclared}"
    if model.text_tower is None:
        return image
    declared = spec.text_activation or (spec.activation and spec.head.kind == "zero_shot")
    undeclared = "" if declared else " (not declared)"
    return f"{image}, of its text tower {_names(activations_of(model.text_tower))}{undeclared}"


def _agree(declared: str, built: set[str]) -> bool:
    return declared in built and built <= {declared, *_BESIDE.get(declared, ())}


_QUICK_NAME = "take the '-quickgelu' name of the model, or model_args.force_quick_gelu = true"


def _image_hint(spec: BackboneSpec, built: set[str]) -> str:
    if spec.activation in built or not built:
        return "leave activation out: it is checked where a model has one that is known"
    if not built & _GELUS:  # the architecture's own, which no weights change
        return f'write activation = "{sorted(built)[0]}"; a text tower has text_activation'
    if spec.loader == "open_clip" and spec.activation == "quick_gelu":
        return _QUICK_NAME
    if spec.loader == "timm":
        return f'model_args.act_layer = "{spec.activation}", or a model name that says so'
    return "build the model with the activation its weights were trained with"


def _text_hint(spec: BackboneSpec, wanted: str, built: set[str]) -> str:
    if wanted == "quick_gelu" and spec.loader == "open_clip":
        return _QUICK_NAME
    if len(built) == 1:
        return f'if its weights were trained so, write text_activation = "{min(built)}"'
    return "build the model with the activation its weights were trained with"


def _names(built: set[str]) -> str:
    return ", ".join(sorted(built)) or "none that is known"
