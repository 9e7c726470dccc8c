"""timm's ConvNeXt.

stem.i … | stages.0.downsample | stages.0.blocks.0 … stages.3.blocks.j | norm_pre | head …

head: global_pool | norm | flatten | pre_logits | drop | fc; with `head_norm_first` the norm is
norm_pre, and the head is global_pool | drop | fc. Without `conv_mlp`, maps within a block are
[b h w c] from its norm on.
"""

from __future__ import annotations

from timm.layers.classifier import NormMlpClassifierHead
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from saebench.backbones.architectures.parts import each, one, within
from saebench.backbones.steps import Output, Step, SteppedModel


def convnext(model: ConvNeXt, size: int | None) -> SteppedModel:
    """`forward_features`, then `forward_head`."""
    stages = [f"stages.{i}" for i in range(len(model.stages))]
    normed = not isinstance(model.norm_pre, nn.Identity)
    pool_first = isinstance(model.head, NormMlpClassifierHead)
    head = ("global_pool", "norm", "flatten", "pre_logits", "drop")

    def read(x: Tensor) -> Output:
        return Output(x, model.head.fc(x) if model.num_classes > 0 else None)

    return SteppedModel(
        module=model,
        steps=(
            *each(model, "stem"),
            *within("stages", (step for stage in stages for step in _stage(model, stage))),
            one(model, "norm_pre"),
            *(
                one(model, f"head.{name}")
                for name in (head if pool_first else ("global_pool", "drop"))
            ),
        ),
        read=read,
        reads=("head.fc",),
        n_classes=model.num_classes,
        natural={
            **{name: name for name in stages},
            **({"norm": "norm_pre"} if normed else {}),
            "pooled": "head.drop",
        },
    )


def _stage(model: ConvNeXt, path: str) -> tuple[Step, ...]:
    return within(path, (one(model, f"{path}.downsample"), *each(model, f"{path}.blocks")))
