"""open_clip's ModifiedResNet, the image tower of CLIP's RN50 and its like.

visual.conv1 | bn1 | act1 | … | visual.avgpool | visual.layer1.0 … visual.layer4.j
| visual.attnpool -> image embedding, not normalised
"""

from __future__ import annotations

from open_clip.modified_resnet import ModifiedResNet
from torch import nn

from saebench.backbones.architectures.parts import each, one, pair, within
from saebench.backbones.steps import Output, SteppedModel

_STAGES = ("layer1", "layer2", "layer3", "layer4")


def modified_resnet(model: nn.Module, visual: ModifiedResNet, size: int) -> SteppedModel:
    """The image tower `visual` of a model. Its attention pooling fixes the image size."""
    stem = [f"visual.{name}{i}" for i in (1, 2, 3) for name in ("conv", "bn", "act")]
    steps = (
        *(one(model, path) for path in (*stem, "visual.avgpool")),
        *(step for stage in _STAGES for step in each(model, f"visual.{stage}")),
        one(model, "visual.attnpool"),
    )
    sides = visual.image_size
    return SteppedModel(
        module=model,
        steps=within("visual", steps),
        read=Output,
        tower=visual,
        image_size=(sides, sides) if isinstance(sides, int) else pair(sides),
        natural={**{name: f"visual.{name}" for name in _STAGES}, "embedding": "visual"},
    )
