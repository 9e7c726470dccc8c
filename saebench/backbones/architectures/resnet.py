"""timm's ResNet, and its pre-activation form ResNetV2 (BiT).

ResNet      conv1 | bn1 | act1 | maxpool | layer1.0 … layer4.j | global_pool | fc
ResNetV2    stem.… | stages.0.blocks.0 … stages.3.blocks.j | norm | head.global_pool | head.drop
            | head.fc, flattened
"""

from __future__ import annotations

from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from torch import Tensor

from saebench.backbones.architectures.parts import each, one, within
from saebench.backbones.steps import Output, SteppedModel


def resnet(model: ResNet, size: int | None) -> SteppedModel:
    """`forward_features`, then `forward_head`."""
    stages = ("layer1", "layer2", "layer3", "layer4")

    def read(x: Tensor) -> Output:
        return Output(x, model.fc(x) if model.num_classes > 0 else None)

    return SteppedModel(
        module=model,
        steps=(
            *(one(model, name) for name in ("conv1", "bn1", "act1", "maxpool")),
            *(step for name in stages for step in each(model, name)),
            one(model, "global_pool"),
        ),
        read=read,
        reads=("fc",),
        n_classes=model.num_classes,
        natural={**{name: name for name in stages}, "pooled": "global_pool"},
    )


def resnet_v2(model: ResNetV2, size: int | None) -> SteppedModel:
    """The head's layers are convolutions: what it pools stays a map of one place until the end."""
    stages = [f"stages.{i}" for i in range(len(model.stages))]
    blocks = (within(stage, each(model, f"{stage}.blocks")) for stage in stages)

    def read(x: Tensor) -> Output:
        flat = model.head.flatten
        return Output(flat(x), flat(model.head.fc(x)) if model.num_classes > 0 else None)

    return SteppedModel(
        module=model,
        steps=(
            *each(model, "stem"),
            *within("stages", (step for stage in blocks for step in stage)),
            one(model, "norm"),
            one(model, "head.global_pool"),
            one(model, "head.drop"),
        ),
        read=read,
        reads=("head.fc",),
        n_classes=model.num_classes,
        natural={**{name: name for name in (*stages, "norm")}, "pooled": "head.global_pool"},
    )
