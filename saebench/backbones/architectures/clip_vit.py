"""open_clip's VisionTransformer, the image tower of CLIP.

visual.conv1, class token, position embedding, visual.ln_pre | visual.transformer.resblocks.i …
| visual.ln_post | pool | projection -> image embedding, not normalised
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from open_clip.transformer import LayerScale, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from saebench.backbones.architectures.last_block import NORMS, Short, known
from saebench.backbones.architectures.parts import one, pair, runs_as, within
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
    *first, last = within("visual.transformer", (one(model, path) for path in blocks))
    if _reads_cls(visual):
        last = replace(last, short=_short(_blocks(visual)[-1]))
    body = (embed, *first, last)
    steps = (*body, *_pool(visual), project)
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
        sequence=len(body) + 1 if _norm_is_a_step(visual) else None,
        natural={**natural, "embedding": "visual"},
    )


def _blocks(visual: VisionTransformer) -> Any:
    return visual.transformer.resblocks


def _reads_cls(visual: VisionTransformer) -> bool:
    """Whether nothing after the blocks sees any token but CLS."""
    return (
        runs_as(visual, VisionTransformer, "_pool", "_global_pool")
        and (visual.attn_pool is None and visual.pool_type == "tok")
        and isinstance(visual.ln_post, NORMS)
    )


def _short(block: Any) -> Short | None:
    """The row of CLS alone (`last_block`), by attention with keys and values of its own."""
    parts = {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"}
    fits = (
        known(block, ResidualAttentionBlock, parts, "attention")
        and type(block.attn) is nn.MultiheadAttention
        and all(isinstance(norm, NORMS) for norm in (block.ln_1, block.ln_2))
        and all(isinstance(scale, (LayerScale, nn.Identity)) for scale in (block.ls_1, block.ls_2))
        and type(block.mlp) is nn.Sequential
        and [name for name, _ in block.mlp.named_children()] == ["c_fc", "gelu", "c_proj"]
    )
    if not fits:
        return None

    def short(x: Tensor) -> Tensor:
        normed = block.ln_1(x)
        y = x[:, :1] + block.ls_1(block.attention(normed[:, :1], normed, normed))
        return y + block.ls_2(block.mlp(block.ln_2(y)))

    return short


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
