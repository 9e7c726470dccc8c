"""timm's EfficientNet, which MobileNetV2 is one of, and MobileNetV3.

EfficientNet    conv_stem | bn1 | blocks.0.0 … | conv_head | bn2 | global_pool | classifier
MobileNetV3     conv_stem | bn1 | blocks.0.0 … | global_pool | conv_head | norm_head | act2
                | flatten | classifier

`bn1` and `bn2` are a norm and its activation. `blocks.i` is a stage, `blocks.i.j` a block.
"""

from __future__ import annotations

from typing import Any

from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor

from saebench.backbones.architectures.parts import each, one, within
from saebench.backbones.steps import Output, SteppedModel


def efficientnet(model: EfficientNet, size: int | None) -> SteppedModel:
    """`forward_features`, then `forward_head`."""
    head = {"bn2": "bn2", "pooled": "global_pool"}
    return _stepped(model, ("conv_head", "bn2", "global_pool"), head)


def mobilenet_v3(model: MobileNetV3, size: int | None) -> SteppedModel:
    """The head pools before its last convolution."""
    head = ("global_pool", "conv_head", "norm_head", "act2", "flatten")
    return _stepped(model, head, {"pooled": "flatten"})


def _stepped(model: Any, head: tuple[str, ...], natural: dict[str, str]) -> SteppedModel:
    stages = [f"blocks.{i}" for i in range(len(model.blocks))]

    def read(x: Tensor) -> Output:
        return Output(x, model.classifier(x) if model.num_classes > 0 else None)

    return SteppedModel(
        module=model,
        steps=(
            one(model, "conv_stem"),
            one(model, "bn1"),
            *within("blocks", (step for stage in stages for step in each(model, stage))),
            *(one(model, name) for name in head),
        ),
        read=read,
        reads=("classifier",),
        n_classes=model.num_classes,
        natural={**{name: name for name in stages}, **natural},
    )
