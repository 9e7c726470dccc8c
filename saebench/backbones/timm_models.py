"""timm models as steps: VisionTransformer (with class, distillation and register tokens), ResNet.

VisionTransformer   patch_embed | position embedding, pos_drop | norm_pre | blocks.i … | norm |
                    pool | fc_norm, head_drop | head
Distilled           … | norm | both heads, averaged
ResNet              conv1 | bn1 | act1 | maxpool | layer1.0 … layer4.j | global_pool | fc

The steps repeat `forward_features` and `forward_head`. A subclass that overrides one of them is
another forward pass, and is refused rather than run as if it were this one.
"""

from __future__ import annotations

from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from saebench.backbones.steps import Output, Step, SteppedModel


def stepped(model: nn.Module) -> SteppedModel | None:
    """A timm model as steps, or None where its forward pass is not one of those known here."""
    kind: Any = type(model)
    if isinstance(model, VisionTransformer):
        if kind.forward_features is not VisionTransformer.forward_features:
            return None
        if kind.forward_head is VisionTransformer.forward_head:
            return _vision_transformer(model)
        if kind.forward_head is VisionTransformerDistilled.forward_head:
            return _distilled(model)
    if (
        isinstance(model, ResNet)
        and kind.forward_features is ResNet.forward_features
        and kind.forward_head is ResNet.forward_head
    ):
        return _resnet(model)
    return None


def one(model: nn.Module, path: str) -> Step:
    """A step that is one module."""
    return Step(model.get_submodule(path), modules=(path,), starts=(path,), ends=(path,))


def _features(model: VisionTransformer) -> tuple[Step, ...]:
    """`forward_features`: images -> the normed sequence [b t d]."""

    sequence: Any = model.blocks

    def embed(x: Tensor) -> Tensor:
        return model.patch_drop(model._pos_embed(x))

    embedding = ("pos_drop", "patch_drop")
    last = len(sequence) - 1
    blocks = [
        Step(
            block,
            modules=(f"blocks.{i}",),
            starts=(f"blocks.{i}", "blocks") if i == 0 else (f"blocks.{i}",),
            ends=(f"blocks.{i}", "blocks") if i == last else (f"blocks.{i}",),
        )
        for i, block in enumerate(sequence)
    ]
    return (
        one(model, "patch_embed"),
        Step(embed, modules=embedding, ends=embedding),
        one(model, "norm_pre"),
        *blocks,
        one(model, "norm"),
    )


def _about(model: VisionTransformer) -> dict[str, Any]:
    """What is known of the tokens of a VisionTransformer."""
    prefix = {
        "cls": int(model.cls_token is not None),
        "distillation": int(isinstance(model, VisionTransformerDistilled)),
        "registers": model.num_reg_tokens,
    }
    size = model.patch_embed.img_size
    fixed = size is not None and not model.dynamic_img_size
    return {
        "module": model,
        "n_classes": model.num_classes,
        "prefix": prefix,
        "grid": _pair(model.patch_embed.grid_size) if fixed else None,
        "image_size": _pair(size) if fixed else None,
    }


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1])


def _vision_transformer(model: VisionTransformer) -> SteppedModel:
    pool_modules = () if model.attn_pool is None else ("attn_pool",)

    def norm_pooled(x: Tensor) -> Tensor:
        return model.head_drop(model.fc_norm(x))

    def read(x: Tensor) -> Output:
        return Output(x, model.head(x) if model.num_classes > 0 else None)

    pool = Step(model.pool, modules=pool_modules, ends=pool_modules)
    fc_norm = Step(
        norm_pooled, modules=("fc_norm",), starts=("fc_norm",), ends=("fc_norm", "head_drop")
    )
    steps = (*_features(model), pool, fc_norm)
    return SteppedModel(steps=steps, read=read, reads=("head",), **_about(model))


def _distilled(model: VisionTransformer) -> SteppedModel:
    """DeiT with a distillation token: the two heads read two tokens, and their means are taken."""

    def read(x: Tensor) -> Output:
        embedding = model.forward_head(x, pre_logits=True)
        return Output(embedding, model.forward_head(x) if model.num_classes > 0 else None)

    return SteppedModel(steps=_features(model), read=read, **_about(model))


def _resnet(model: ResNet) -> SteppedModel:
    stages = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        stage = model.get_submodule(name)
        last = len(list(stage.children())) - 1
        for i, block in enumerate(stage.children()):
            path = f"{name}.{i}"
            starts = (path, name) if i == 0 else (path,)
            ends = (path, name) if i == last else (path,)
            stages.append(Step(block, modules=(path,), starts=starts, ends=ends))

    def read(x: Tensor) -> Output:
        return Output(x, model.fc(x) if model.num_classes > 0 else None)

    stem = [one(model, name) for name in ("conv1", "bn1", "act1", "maxpool")]
    return SteppedModel(
        module=model,
        steps=(*stem, *stages, one(model, "global_pool")),
        read=read,
        reads=("fc",),
        n_classes=model.num_classes,
    )
