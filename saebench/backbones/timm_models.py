"""Which of timm's models are known as steps: a table of classes, and the files that know them.

The steps of a family repeat `forward_features` and `forward_head` of its class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientnet import EfficientNet
from timm.models.eva import Eva
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from saebench.backbones.architectures import convnext, efficientnet, eva, resnet, vit
from saebench.backbones.architectures.parts import runs_as
from saebench.backbones.steps import SteppedModel

# class -> (model, image size) -> its steps
KNOWN: dict[type[nn.Module], Callable[[Any, int | None], SteppedModel]] = {
    VisionTransformer: vit.vision_transformer,
    VisionTransformerDistilled: vit.distilled,
    Eva: eva.eva,
    ConvNeXt: convnext.convnext,
    EfficientNet: efficientnet.efficientnet,
    MobileNetV3: efficientnet.mobilenet_v3,
    ResNet: resnet.resnet,
    ResNetV2: resnet.resnet_v2,
}


def stepped(model: nn.Module, size: int | None = None) -> SteppedModel | None:
    """A timm model as steps, or None where its forward pass is not one of those known here.

    size: of the square images it is used at, in pixels; none: as it was built.
    """
    for known, steps in KNOWN.items():
        if runs_as(model, known, "forward", "forward_features", "forward_head"):
            return steps(model, size)
    return None
