"""What the splice benchmark measures: eight SAEs after block 10 of a ViT-B/16 of random weights.

saebench   the pass once, then what comes after the site: clean, zero, mean, eight splices
naive      eleven whole passes with a forward hook, dense codes
bare       one pass, what comes after the site ten times, eight encoder products
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from saebench.backbones import Backbone, stepped
from saebench.backbones.backbone import LastBlock
from saebench.batch import SaeBatch
from saebench.controls import Identity
from saebench.images import Images
from saebench.readouts import OwnHead
from saebench.saes import TILE_BYTES, Coder, Sae
from saebench.specs import BackboneSpec, HeadSpec, InputSpec, SiteSpec
from saebench.task import Context, Task
from tests.bench.setting import KINDS, D, make_sae
from tests.measure import context, task_class

SITE, BLOCK, CLASSES = "blocks.10", 10, 1000
SPEC = BackboneSpec(
    name="vit-b16",
    loader="timm",
    model="vit_base_patch16_224",
    input=InputSpec(size=224),
    sites={SITE: SiteSpec(path=SITE, width=D, cls=1, grid=(14, 14))},
    head=HeadSpec(kind="classifier", classes={"bench": (0, CLASSES)}),
)


class Splicing:
    """Some images, eight SAEs, and one timm model that all ways of measuring share."""

    def __init__(self, n_images: int, n_saes: int = 8) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.vit: Any = timm.create_model(SPEC.model, pretrained=False).eval()
        generator = torch.Generator().manual_seed(1)
        self.images_b3hw = torch.randn(n_images, 3, 224, 224, generator=generator)
        self.mean_td = torch.randn(1, D, generator=generator).expand(sum(TOKENS), D)
        self.labels_b = np.arange(n_images) % CLASSES
        self.saes = [make_sae(seed) for seed in range(n_saes)]
        self.backbones = {
            last_block: Backbone(SPEC, stepped(self.vit, SPEC), last_block=last_block)
            for last_block in ("full", "cls")
        }

    # --- saebench -------------------------------------------------------------------------------

    def batch(self, last_block: LastBlock = "full") -> Images:
        backbone = self.backbones[last_block]
        ids = [f"image{i}" for i in range(len(self.images_b3hw))]
        captures = backbone.acts(self.images_b3hw, [SITE])
        means = {SITE: self.mean_td}
        return Images(backbone, "bench", ids, self.labels_b, {}, 0, captures, means)

    def measured(self, last_block: LastBlock = "full") -> list[Task]:
        """The task loss_substitution for every SAE, on one batch of images."""
        images, tasks = self.batch(last_block), []
        for sae in self.saes:
            task = task_class("loss_substitution")()
            task.start(self.context(sae))
            task.update(self.sae_batch(images, sae))
            tasks.append(task)
        images.forget()
        return tasks

    def context(self, coder: Coder) -> Context:
        return context(
            torch.empty(len(self.images_b3hw), sum(TOKENS), 0),
            coder,
            kinds=KINDS,
            n_images=len(self.images_b3hw),
            shift_d=np.zeros(D),
            class_names=[str(i) for i in range(CLASSES)],
            options={
                name: option.default
                for name, option in task_class("loss_substitution").options.items()
            },
            readouts=[OwnHead(slice(0, CLASSES))],
        )

    def sae_batch(self, images: Images, coder: Coder) -> SaeBatch:
        return SaeBatch(images.view(SITE, tuple(KINDS)), coder, TILE_BYTES)

    def logits(self, last_block: LastBlock = "full") -> dict[str, Tensor]:
        """What the measured passes say: clean, zero, mean, identity, and each SAE by its number."""
        images = self.batch(last_block)
        first = self.sae_batch(images, self.saes[0])
        outputs = {
            "clean": first.clean_output,
            "zero": first.ablated_output("zero"),
            "mean": first.ablated_output("mean"),
            "identity": self.sae_batch(images, Identity(D)).spliced_output(),
        }
        for i, sae in enumerate(self.saes):
            outputs[f"sae {i}"] = self.sae_batch(images, sae).spliced_output()
        return {name: found(output.logits_bc) for name, output in outputs.items()}

    # --- naive ----------------------------------------------------------------------------------

    def naive(self) -> dict[str, Tensor]:
        """The same logits from eleven whole passes of the timm model with a forward hook."""
        edits: dict[str, Callable[[Tensor], Tensor]] = {
            "clean": lambda x_btd: x_btd,
            "zero": torch.zeros_like,
            "mean": lambda x_btd: self.mean_td.expand_as(x_btd),
        }
        for i, sae in enumerate(self.saes):
            edits[f"sae {i}"] = lambda x_btd, sae=sae: densely(sae, x_btd)
        logits = {}
        for name, edit in edits.items():
            hook = self.vit.blocks[BLOCK].register_forward_hook(
                lambda m, i, out, edit=edit: edit(out)
            )
            logits[name] = self.vit(self.images_b3hw)
            hook.remove()
        return logits

    # --- bare -----------------------------------------------------------------------------------

    def forward(self) -> Tensor:
        return self.vit(self.images_b3hw)

    @cached_property
    def x_btd(self) -> Tensor:
        """Activations at the site, by a hook."""
        seen: list[Tensor] = []
        hook = self.vit.blocks[BLOCK].register_forward_hook(lambda m, i, out: seen.append(out))
        self.forward()
        hook.remove()
        return seen[0].clone()

    def after(self) -> Tensor:
        """What comes after the site, once."""
        vit = self.vit
        return vit.forward_head(vit.norm(vit.blocks[BLOCK + 1](self.x_btd)))

    def after_cls(self) -> Tensor:
        """The same with the last block's query, projection and MLP of CLS alone."""
        vit, block, x_btd = self.vit, self.vit.blocks[BLOCK + 1], self.x_btd
        attn, u_btd = block.attn, block.norm1(x_btd)
        W_q, W_kv = attn.qkv.weight.split([D, 2 * D])
        b_q, b_kv = attn.qkv.bias.split([D, 2 * D])
        heads = attn.num_heads
        q = (u_btd[:, :1] @ W_q.T + b_q).unflatten(2, (heads, -1)).transpose(1, 2)
        kv = torch.nn.functional.linear(u_btd, W_kv, b_kv).unflatten(2, (2, heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_b1d = x_btd[:, :1] + attn.proj(mixed)
        return vit.head(vit.norm(x_b1d + block.mlp(block.norm2(x_b1d)))[:, 0])


TOKENS = tuple(part.stop - part.start for part in KINDS.values())


def densely(sae: Sae, x_btd: Tensor) -> Tensor:
    """Dense codes and dense decoding: how it is usually written."""
    pre = (x_btd - sae.b_dec_d) @ sae.W_enc_ds + sae.b_enc_s
    assert sae.k is not None
    kept = torch.topk(pre, sae.k, dim=-1)
    z = torch.zeros_like(pre).scatter_(-1, kept.indices, kept.values.relu())
    return z @ sae.W_dec_sd + sae.b_dec_d


def found(logits_bc: Tensor | None) -> Tensor:
    assert logits_bc is not None
    return logits_bc
