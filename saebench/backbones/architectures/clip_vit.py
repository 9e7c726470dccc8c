"""open_clip's VisionTransformer, the image tower of CLIP.

visual.conv1, class token, position embedding, visual.ln_pre | visual.transformer.resblocks.i …
| visual.ln_post | pool | projection -> image embedding, not normalised
"""

from __future__ import annotations

from typing import Any

from open_clip.transformer import VisionTransformer
from torch import nn

from saebench.backbones.architectures.parts import one, pair, within
from saebench.backbones.steps import Output, Step, SteppedModel


def vision_transformer(
    model: nn.Module, visual: VisionTransformer, size: int
) -> SteppedModel | None:
    """The image tower `visual` of a model; None where its axes are [tokens, images, width]."""
    if not visual.transformer.batch_first:
        return None
    blocks = [f"visual.transformer.resblocks.{i}" for i in range(len(_blocks(visual)))]
    project = Step(lambda x: x if visual.proj is None else x @ visual.proj)
    embed = Step(
        visual._embeds,
        modules=("visual.conv1", "visual.patch_dropout", "visual.ln_pre"),
        starts=("visual.conv1",),
        ends=("visual.ln_pre",),
    )
    steps = (
        embed,
        *within("visual.transformer", (one(model, path) for path in blocks)),
        *_pool(visual),
        project,
    )
    natural = {f"blocks.{i}": path for i, path in enumerate(blocks)}
    if _norm_is_a_step(visual):
        natural["norm"] = "visual.ln_post"
    return SteppedModel(
        module=model,
        steps=within("visual", steps),
        read=Output,
        tower=visual,
        prefix={"cls": 1},
        grid=pair(visual.grid_size),
        image_size=pair(visual.image_size),
        natural={**natural, "embedding": "visual"},
    )


def _blocks(visual: VisionTransformer) -> Any:
    return visual.transformer.resblocks


def _norm_is_a_step(visual: VisionTransformer) -> bool:
    return visual.attn_pool is None and not visual.final_ln_after_pool


def _pool(visual: VisionTransformer) -> tuple[Step, ...]:
    """`_pool`, with the final norm as a step of its own where it comes first, as in CLIP."""
    if not _norm_is_a_step(visual):
        pooling = ("visual.ln_post", "visual.attn_pool", "visual.attn_pool_contrastive")
        return (Step(lambda x: visual._pool(x)[0], modules=pooling),)
    ln_post = ("visual.ln_post",)
    return (
        Step(visual.ln_post, modules=ln_post, starts=ln_post, ends=ln_post),
        Step(lambda x: visual._global_pool(x)[0]),
    )
