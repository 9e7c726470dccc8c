"""Of the last block only what a head that reads CLS sees: the same embedding, to rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import Tensor, nn

from saebench.backbones import Backbone, load_backbone, stepped, timm_models
from saebench.backbones.steps import Step
from saebench.specs import HeadSpec, SiteSpec
from tests.backbone_cases import CASES, DINOV3, EVA, VIT, Case, clip_config, images, load, randomise


def _sites(registers: int = 0) -> dict[str, SiteSpec]:
    paths = {"blocks.1": "blocks.1", "normed": "norm"}
    return {
        name: SiteSpec(path=path, width=24, cls=1, registers=registers, grid=(4, 4))
        for name, path in paths.items()
    }


def _vit(name: str = "vit_tiny_patch16_224", **args: Any) -> Case:
    args = {**VIT, "num_classes": 7, **args}
    return Case("timm", name, args, _sites())


def _eva(name: str, base: dict[str, Any], **args: Any) -> Case:
    args = {"global_pool": "token", "use_fc_norm": False, **base, **args}
    return Case("timm", name, args, _sites(registers=4 * ("dinov3" in name)))


def _clip(**vision: Any) -> Case:
    return replace(CASES["clip"], config=clip_config(**vision), activation=None)


_DINOV3 = {**DINOV3, "img_size": 32}

_AS_THEY_ARE = ["vit", "vit-quick-gelu", "vit-registers", "vit-no-embed-class"]
_AS_THEY_ARE += ["vit-clip-pre-norm", "dinov3-cls", "clip", "clip-quick-gelu"]
_AS_THEY_ARE += ["clip-norm-after-pool", "clip-trunk-projected"]

# Whose head reads CLS alone: each form of attention, norm and MLP.
SHORT = {
    **{name: CASES[name] for name in _AS_THEY_ARE},
    "vit-layer-scale": _vit(init_values=0.1),
    "vit-qk-norm": _vit(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "vit-no-biases": _vit(qkv_bias=False, proj_bias=False),
    "vit-drop": _vit(drop_path_rate=0.5, attn_drop_rate=0.5, proj_drop_rate=0.5),
    "vit-swiglu": _vit("vit_giant_patch14_dinov2", mlp_ratio=2.66667),
    "eva02": _eva("eva02_tiny_patch14_224", EVA),
    "eva02-base": _eva("eva02_base_patch14_224", EVA),  # its q, k and v apart, a norm within
    "eva": _eva("eva_giant_patch14_224", EVA, init_values=0.1),
    "eva-learned-rotary": _eva("vit_small_patch16_rope_mixed_224", EVA),
    "dinov3-registers": _eva("vit_small_patch16_dinov3", _DINOV3),
    "eva-half": _eva("vit_small_patch16_dinov3", _DINOV3, rope_rotate_half=True),
    "eva-shared-heads": _eva(
        "vit_small_patch16_dinov3",
        _DINOV3,
        attn_type="rope",
        qkv_fused=False,
        num_kv_heads=1,
        qk_norm=True,
        attn_only_layer_scale=True,
    ),
    "clip-layer-scale": _clip(ls_init_value=0.1),
    "clip-no-norm-before": _clip(no_ln_pre=True),
}

# Whose head reads more than CLS, or which have none.
FULL = ["vit-average", "vit-attention-pool", "deit-distilled", "dinov3", "eva02", "eva"]
FULL += ["eva-rotary-registers", "eva-attention-pool", "clip-average", "clip-attention-pool"]
FULL += ["siglip", "clip-trunk-classifier", "resnet10t", "convnext", "clip-resnet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("last")


_loaded: dict[str, tuple[Backbone, Backbone]] = {}


def both_of(name: str, folder: Path, case: Case | None = None) -> tuple[Backbone, Backbone]:
    """A backbone with the whole last block, and one with the CLS row of it."""
    case = case or SHORT[name]
    if name not in _loaded:
        (folder / name).mkdir(exist_ok=True)
        full = load(case, folder / name)
        _loaded[name] = full, load_backbone(full.spec, last_block="cls")
    return _loaded[name]


def last_block(backbone: Backbone) -> Step:
    (step,) = [step for step in backbone.model.steps if step.short is not None]
    return step


@contextmanager
def counted(backbone: Backbone) -> Iterator[list[int]]:
    """How many tokens the MLP of the last block is given, at each call."""
    block: Any = backbone.model.module.get_submodule(last_block(backbone).modules[0])
    seen: list[int] = []
    handle = block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    yield seen
    handle.remove()


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", SHORT)
def test_the_row_of_cls_is_the_blocks_own(name: str, folder: Path) -> None:
    """In float64, where an error of the formula cannot hide behind rounding."""
    full, _ = both_of(name, folder)
    module = copy.deepcopy(full.model.module).double()
    model = stepped(module, full.spec)
    step = last_block(Backbone(full.spec, model, dtype=torch.float64))
    site = next(site for key, site in full.spec.sites.items() if key.startswith("blocks"))
    generator = torch.Generator().manual_seed(3)
    x_btd = 2 * torch.randn(3, site.tokens, site.width, dtype=torch.float64, generator=generator)
    assert step.short is not None
    with torch.inference_mode():
        wanted_btd, found_b1d = step.run(x_btd), step.short(x_btd)
        assert found_b1d.shape == (3, 1, site.width)
        assert off(found_b1d, wanted_btd[:, :1]) < 1e-13
        # What it must tell apart: which token is CLS, where the patches are, what they are.
        for other_btd in (x_btd.roll(1, dims=1), x_btd * 1.01):
            assert off(step.short(other_btd), found_b1d) > 1e-4
        other_btd = x_btd.clone()
        other_btd[:, -1] = other_btd[:, -1].flip(-1)
        assert off(step.short(other_btd), found_b1d) > 1e-6
        # Only where they are rotated it matters which patch stands where.
        swapped_btd = torch.cat([x_btd[:, :-2], x_btd[:, -2:].flip(1)], dim=1)
        rotated = getattr(module, "rope", None) is not None
        assert (off(step.short(swapped_btd), found_b1d) > 1e-9) == rotated


@pytest.mark.parametrize("name", SHORT)
def test_embeddings_agree_with_the_whole_block(name: str, folder: Path) -> None:
    full, cls = both_of(name, folder)
    x = images(size=full.spec.input.size)
    wanted = full.forward(x)
    with counted(cls) as seen:
        found = cls.forward(x)
    assert seen == [1]
    assert 0 <= off(found.embedding_bd, wanted.embedding_bd) < 1e-5
    assert (found.logits_bc is None) == (wanted.logits_bc is None)
    if found.logits_bc is not None and wanted.logits_bc is not None:
        assert off(found.logits_bc, wanted.logits_bc) < 1e-5
    for site, capture in full.acts(x, list(full.spec.sites)).items():
        own = cls.acts(x, [site])[site]  # all tokens, whatever the head reads
        assert torch.equal(own.acts_btd, capture.acts_btd), site
        assert own.state.keys() == capture.state.keys()
        changed_btd = 0.5 * capture.acts_btd + 0.1
        wanted = full.resume(site, changed_btd, capture.state)
        with counted(cls) as seen:
            found = cls.resume(site, changed_btd, own.state)
        assert off(found.embedding_bd, wanted.embedding_bd) < 1e-5, site
        same = torch.equal(found.embedding_bd, wanted.embedding_bd)
        short = seen[-1:] == [1]  # how maps lie in memory is found by one pass of whole blocks
        assert same or short, site
        # A pass resumes where it stopped, to the last bit where it runs the same block.
        again = cls.resume(site, capture.acts_btd, capture.state)
        other = (cls if short else full).forward(x)
        assert torch.equal(again.embedding_bd, other.embedding_bd), site


def test_sites_at_within_and_after_the_last_block(folder: Path) -> None:
    full, cls = both_of("vit", folder)
    x = images()
    names = ["blocks.1", "mlp in", "mlp", "blocks.2", "all blocks", "normed", "fc_norm"]
    for site in names:
        capture = cls.acts(x, [site])[site]
        changed_btd = 0.5 * capture.acts_btd + 0.1
        with counted(cls) as seen:
            found = cls.resume(site, changed_btd, capture.state)
        wanted = full.resume(site, changed_btd, capture.state)
        assert seen == {"blocks.1": [1], "mlp in": [17], "mlp": [17]}.get(site, [])
        assert (site == "blocks.1") or torch.equal(found.embedding_bd, wanted.embedding_bd)


@pytest.mark.parametrize("edited", ["mlp in", "mlp", "blocks.2", "normed", "fc_norm"])
def test_a_site_that_is_edited_at_or_after_the_last_block(edited: str, folder: Path) -> None:
    full, cls = both_of("vit", folder)
    capture = cls.acts(images(), ["blocks.0"])["blocks.0"]
    edits = {edited: lambda acts_btd: 0.5 * acts_btd + 0.1}
    with counted(cls) as seen:
        found = cls.resume("blocks.0", capture.acts_btd, {}, edits)
    assert seen == [17]
    wanted = full.resume("blocks.0", capture.acts_btd, {}, edits)
    assert torch.equal(found.embedding_bd, wanted.embedding_bd)


@pytest.mark.parametrize("edited", ["attn", "blocks.1"])
def test_a_site_that_is_edited_before_the_last_block(edited: str, folder: Path) -> None:
    full, cls = both_of("vit", folder)
    capture = cls.acts(images(), ["blocks.0"])["blocks.0"]
    edits = {edited: lambda acts_btd: 0.5 * acts_btd + 0.1}
    with counted(cls) as seen:
        found = cls.resume("blocks.0", capture.acts_btd, {}, edits)
    assert seen == [1]
    wanted = full.resume("blocks.0", capture.acts_btd, {}, edits)
    assert off(found.embedding_bd, wanted.embedding_bd) < 1e-5


@pytest.mark.parametrize(
    ("features", "tokens"),
    [(("cls",), 1), (("patches",), 17), (("cls", "patches"), 17)],
)
def test_a_linear_head_that_reads_patches_needs_the_whole_block(
    features: Any, tokens: int, folder: Path
) -> None:
    full, _ = both_of("vit", folder)
    spec = replace(full.spec, head=HeadSpec(features=features))
    wanted = load_backbone(spec).forward(images())
    cls = load_backbone(spec, last_block="cls")
    with counted(cls) as seen:
        found = cls.forward(images())
    assert seen == [tokens]
    assert off(found.read_bd, wanted.read_bd) < 1e-5
    assert torch.equal(found.read_bd, wanted.read_bd) or tokens == 1


@pytest.mark.parametrize("name", FULL)
def test_models_without_a_short_way_are_as_they_were(name: str, folder: Path) -> None:
    full, cls = both_of(f"full {name}", folder, CASES[name])
    assert all(step.short is None for step in cls.model.steps)
    x = images(size=full.spec.input.size)
    assert torch.equal(cls.forward(x).embedding_bd, full.forward(x).embedding_bd)
    for site, capture in full.acts(x, list(full.spec.sites)[:8]).items():
        found = cls.resume(site, capture.acts_btd, capture.state)
        wanted = full.resume(site, capture.acts_btd, capture.state)
        assert torch.equal(found.embedding_bd, wanted.embedding_bd), site


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit-layer-scale", "dinov3-cls", "clip"])
def test_half_precision(name: str, dtype: torch.dtype, folder: Path) -> None:
    full, _ = both_of(name, folder)
    x = images(size=full.spec.input.size)
    cls = load_backbone(full.spec, dtype=dtype, last_block="cls")
    found = cls.forward(x).embedding_bd
    assert found.dtype == dtype
    assert off(found.float(), full.forward(x).embedding_bd) < 0.1


class Other(nn.Module):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x.flip(1)


class OwnBlock(timm.models.vision_transformer.Block):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return super().forward(x).flip(1)


def _short(model: Any) -> Any:
    made = timm_models.stepped(randomise(model.eval()), 32)
    assert made is not None
    return [step.short for step in made.steps if step.short is not None]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"block_fn": ResPostBlock}),
        ("vit_tiny_patch16_224", {"block_fn": ParallelScalingBlock}),
        ("vit_tiny_patch16_224", {"block_fn": OwnBlock}),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}),
        ("eva02_tiny_patch14_224", {"global_pool": "token", "use_post_norm": True}),
    ],
)
def test_blocks_that_are_not_known_are_run_whole(name: str, args: dict[str, Any]) -> None:
    assert not _short(timm.create_model(name, **{**VIT, **args}))


@pytest.mark.parametrize(
    "path",
    [
        *(f"blocks.2.{name}" for name in ("attn", "mlp", "ls1", "norm1", "drop_path2", "more")),
        *(f"blocks.2.attn.{name}" for name in ("q_norm", "norm", "more")),
        "norm",
    ],
)
def test_parts_that_are_not_known(path: str) -> None:
    args: Any = VIT
    model: Any = timm.create_model("vit_tiny_patch16_224", **args)
    assert len(_short(model)) == 1
    model.set_submodule(path, Other())
    assert not _short(model)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_a_gate_of_attention(name: str) -> None:
    """No model of timm's has one yet: its attention may."""
    model: Any = timm.create_model(name, **{**VIT, "global_pool": "token"})
    model.blocks[2].attn.gate = nn.Linear(24, 24)
    (short,) = _short(model.double())
    tables = model._pos_embed(torch.zeros(1, 4, 4, 24).double())[1] if "dino" in name else None
    x_btd = torch.randn(2, 16 + model.num_prefix_tokens, 24).double()
    with torch.inference_mode():
        block = model.blocks[2]
        wanted_btd = block(x_btd) if tables is None else block(x_btd, rope=tables)
        assert off(short(x_btd), wanted_btd[:, :1]) < 1e-13


def test_a_subclass_that_pools_otherwise() -> None:
    class Mean(timm.models.vision_transformer.VisionTransformer):
        def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
            return x.mean(dim=1)

    args: Any = VIT
    assert not _short(Mean(**args))


def test_open_clips_blocks_of_another_kind(folder: Path) -> None:
    """With a norm of queries and keys it takes its CustomResidualAttentionBlock."""
    full, cls = both_of("clip-custom", folder, _clip(block_type="custom"))
    assert all(step.short is None for step in cls.model.steps)
    assert torch.equal(cls.forward(images()).embedding_bd, full.forward(images()).embedding_bd)
