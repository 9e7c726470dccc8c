"""The last block of a vision transformer whose head reads CLS alone: that token's row, no other.

    x [b t d] -> [b 1 d]:   the query of CLS; keys and values of all tokens
    y  = x_cls + ls1(attention(q(norm1 x_cls), k(norm1 x), v(norm1 x)))
    y' = y + ls2(mlp(norm2 y))

The same arithmetic on fewer rows: a block of width d costs 12·d² multiplications a token, and this
2·d². It agrees with the block's own row to rounding. Only blocks whose parts are all known here
have such a way, none of which may mix tokens: others give None, and are run whole. Here are timm's;
open_clip's is in `clip_vit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.norm import RmsNorm
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from saebench.backbones.architectures.parts import runs_as

Short = Callable[[Tensor], Tensor]

_ATTENTION = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
_SPLIT = (_ATTENTION - {"qkv"}) | {"q_proj", "k_proj", "v_proj"}
_BLOCK = {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"}

NORMS = (nn.LayerNorm, RmsNorm, nn.Identity)  # with the norms derived from them: all of a token
_MLPS = (Mlp, GluMlp, SwiGLU)


def vit_short(block: Any) -> Short | None:
    """Of timm's `Block`."""
    fits = (
        known(block, Block, _BLOCK | {"ls1", "ls2"})
        and known(block.attn, Attention, _ATTENTION)
        and _of_a_token(block, ("ls1", "ls2"))
    )
    if not fits:
        return None

    def short(x: Tensor) -> Tensor:
        y = x[:, :1] + block.drop_path1(block.ls1(_attention(block.attn, block.norm1(x), None)))
        return y + block.drop_path2(block.ls2(block.mlp(block.norm2(y))))

    return short


def eva_short(block: Any, rotary: Callable[[], Tensor | None]) -> Short | None:
    """Of timm's `EvaBlock`. rotary: its table, which turns the keys of patches but no prefix."""
    attention = getattr(block, "attn", None)
    names = _ATTENTION if getattr(attention, "qkv", None) is not None else _SPLIT
    fits = (
        known(block, EvaBlock, _BLOCK)
        and (known(attention, EvaAttention, names) or known(attention, AttentionRope, names))
        and _of_a_token(block)
        and block.attn.num_prefix_tokens > 0
    )
    if not fits:
        return None

    def short(x: Tensor) -> Tensor:
        y = _attention(block.attn, block.norm1(x), rotary())
        y = x[:, :1] + block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)
        z = block.mlp(block.norm2(y))
        return y + block.drop_path2(z if block.gamma_2 is None else block.gamma_2 * z)

    return short


def known(module: Any, kind: type[nn.Module], names: set[str], *methods: str) -> bool:
    """Whether a module is of a class as it is known here, with these parts and no others.

    A gate, of attention, may be there or not.
    """
    if not (isinstance(module, nn.Module) and runs_as(module, kind, "forward", *methods)):
        return False
    return {name for name, _ in module.named_children()} - {"gate"} == names


def _of_a_token(block: Any, scales: tuple[str, ...] = ()) -> bool:
    """Whether what lies around attention sees each token by itself."""
    norms = (block.norm1, block.norm2, block.attn.norm, block.attn.q_norm, block.attn.k_norm)
    drops = (block.drop_path1, block.drop_path2)
    return (
        all(isinstance(norm, NORMS) for norm in norms)
        and all(isinstance(drop, (DropPath, nn.Identity)) for drop in drops)
        and all(isinstance(getattr(block, ls), (LayerScale, nn.Identity)) for ls in scales)
        and type(block.mlp) in _MLPS
    )


def _attention(attention: Any, x: Tensor, rotary: Tensor | None) -> Tensor:
    """timm's `Attention`, `EvaAttention` and `AttentionRope`, the row of the first token."""

    def heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)

    query, key, value = _projections(attention)
    q, k, v = heads(x[:, :1], *query), heads(x, *key), heads(x, *value)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rotary is not None:
        n = attention.num_prefix_tokens
        half = {"half": True} if getattr(attention, "rotate_half", False) else {}
        k = torch.cat([k[:, :, :n], apply_rot_embed_cat(k[:, :, n:], rotary, **half)], dim=2)
        q, k = q.type_as(v), k.type_as(v)
    if k.shape[1] < q.shape[1]:  # heads that share their keys and values
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    y = scaled_dot_product_attention(q, k, v, scale=attention.scale)
    y = attention.norm(y.transpose(1, 2).flatten(2))
    if getattr(attention, "gate", None) is not None:
        y = y * attention.gate(x[:, :1]).sigmoid()
    return attention.proj_drop(attention.proj(y))


def _projections(attention: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of queries, keys and values: three layers, or the thirds of one."""
    if attention.qkv is None:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        return [(layer.weight, layer.bias) for layer in layers]
    weights = attention.qkv.weight.chunk(3)
    if attention.qkv.bias is not None:
        biases = attention.qkv.bias.chunk(3)
    elif getattr(attention, "q_bias", None) is not None:
        biases = (attention.q_bias, attention.k_bias, attention.v_bias)
    else:
        biases = (None, None, None)
    return list(zip(weights, biases, strict=True))
