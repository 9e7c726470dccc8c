"""open_clip image towers as steps: the CLIP VisionTransformer.

visual.conv1, class token, position embedding, visual.ln_pre | visual.transformer.resblocks.i …
| visual.ln_post | pool | projection -> image embedding, not normalised
"""

from __future__ import annotations

from open_clip.transformer import VisionTransformer
from torch import nn

from saebench.backbones.open_clip_text import ClipText
from saebench.backbones.steps import Output, Step, SteppedModel
from saebench.specs import BackboneSpec


def stepped(model: nn.Module, spec: BackboneSpec) -> SteppedModel | None:
    """An open_clip model as steps, or None where its image tower is not one of those known here."""
    visual = getattr(model, "visual", None)
    if type(visual) is not VisionTransformer or not visual.transformer.batch_first:
        return None
    grid, size = visual.grid_size, tuple(visual.image_size)
    return SteppedModel(
        module=model,
        steps=_steps(visual),
        read=Output,
        tower=visual,
        prefix={"cls": 1},
        grid=(grid[0], grid[1]),
        image_size=(size[0], size[1]),
        text=ClipText(model, spec) if hasattr(model, "encode_text") else None,
    )


def _steps(visual: VisionTransformer) -> tuple[Step, ...]:
    blocks = []
    last = len(visual.transformer.resblocks) - 1
    for i, block in enumerate(visual.transformer.resblocks):
        path = f"visual.transformer.resblocks.{i}"
        starts = (path, "visual.transformer") if i == 0 else (path,)
        ends = (path, "visual.transformer") if i == last else (path,)
        blocks.append(Step(block, modules=(path,), starts=starts, ends=ends))

    embed = Step(
        visual._embeds,
        modules=("visual.conv1", "visual.patch_dropout", "visual.ln_pre"),
        starts=("visual", "visual.conv1"),
        ends=("visual.ln_pre",),
    )
    project = Step(lambda x: x if visual.proj is None else x @ visual.proj, ends=("visual",))
    return (embed, *blocks, *_pool(visual), project)


def _pool(visual: VisionTransformer) -> tuple[Step, ...]:
    """`_pool`, with the final norm as a step of its own where it comes first, as in CLIP."""
    if visual.attn_pool is not None or visual.final_ln_after_pool:
        pooling = ("visual.ln_post", "visual.attn_pool", "visual.attn_pool_contrastive")
        return (Step(lambda x: visual._pool(x)[0], modules=pooling),)
    ln_post = ("visual.ln_post",)
    return (
        Step(visual.ln_post, modules=ln_post, starts=ln_post, ends=ln_post),
        Step(lambda x: visual._global_pool(x)[0]),
    )
