"""Whether the output can change with some tokens of a site: against what the architecture says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.backbones import Backbone, load_backbone
from saebench.errors import NotFound, UsageError
from saebench.specs import HeadSpec, SiteSpec
from tests.backbone_cases import CASES, images, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sees")


_loaded: dict[str, Backbone] = {}


def backbone_of(name: str, folder: Path) -> Backbone:
    if name not in _loaded:
        (folder / name).mkdir(exist_ok=True)
        case = CASES[name]
        if name in LAST:
            case = replace(case, sites={**case.sites, **LAST[name]})
        _loaded[name] = load(case, folder / name)
    return _loaded[name]


# Sites of the last block that the cases lack.
LAST = {
    "clip": {
        "last mlp": SiteSpec(
            path="visual.transformer.resblocks.1.mlp",
            width=32,
            cls=1,
            grid=(4, 4),
            kind="branch",
        )
    },
    "clip-trunk-projected": {
        "last": SiteSpec(path="visual.trunk.norm", side="input", width=64, cls=1, grid=(10, 10))
    },
}

NO, YES = False, True


@pytest.mark.parametrize(
    ("name", "site", "kinds", "sees"),
    [
        # Models that read CLS: at the last block, and after it.
        ("vit", "blocks.2", ["patches"], NO),
        ("vit", "blocks.2", ["cls"], YES),
        ("vit", "blocks.2", ["cls", "patches"], YES),
        ("vit", "all blocks", ["patches"], NO),
        ("vit", "normed", ["patches"], NO),
        ("vit", "normed", ["cls"], YES),
        ("vit", "mlp", ["patches"], NO),  # of the last block
        ("vit", "mlp", ["cls"], YES),
        ("vit", "fc_norm", ["pooled"], YES),
        # Before it attention takes them to CLS.
        ("vit", "blocks.1", ["patches"], YES),
        ("vit", "blocks.1", ["cls"], YES),
        ("vit", "blocks.0", ["patches"], YES),
        ("vit", "attn", ["patches"], YES),
        ("vit", "hidden", ["patches"], YES),
        ("vit-registers", "blocks.2", ["registers"], NO),
        ("vit-registers", "blocks.2", ["registers", "patches"], NO),
        ("vit-registers", "blocks.1", ["registers"], YES),
        ("dinov3-cls", "blocks.2", ["patches"], NO),
        ("dinov3-cls", "blocks.2", ["registers"], NO),
        ("dinov3-cls", "blocks.2", ["cls"], YES),
        ("dinov3-cls", "normed", ["patches"], NO),
        ("dinov3-cls", "blocks.1", ["patches"], YES),
        ("clip", "blocks.1", ["patches"], NO),
        ("clip", "blocks.1", ["cls"], YES),
        ("clip", "normed", ["patches"], NO),
        ("clip", "last mlp", ["patches"], NO),
        ("clip", "last mlp", ["cls"], YES),
        ("clip", "attn", ["patches"], NO),  # its output: keys and values are its input
        ("clip", "attn in", ["patches"], YES),
        ("clip", "blocks.0", ["patches"], YES),
        ("clip", "embedding", ["pooled"], YES),
        ("clip-norm-after-pool", "blocks.1", ["patches"], NO),
        ("clip-trunk-projected", "last", ["patches"], NO),
        ("clip-trunk-projected", "last", ["cls"], YES),
        ("clip-trunk-projected", "blocks.1", ["patches"], YES),  # of six
        # Two heads, on two tokens.
        ("deit-distilled", "blocks.2", ["patches"], NO),
        ("deit-distilled", "blocks.2", ["distillation"], YES),
        ("deit-distilled", "blocks.2", ["cls"], YES),
        # Models that read the patches, by their mean or by attention.
        ("vit-average", "blocks.2", ["patches"], YES),
        ("vit-average", "blocks.2", ["cls"], NO),
        ("dinov3", "blocks.2", ["patches"], YES),
        ("eva-rotary-registers", "blocks.2", ["patches"], YES),
        ("eva-rotary-registers", "blocks.2", ["registers"], NO),
        ("vit-attention-pool", "blocks.2", ["patches"], YES),
        ("siglip", "blocks.1", ["patches"], YES),
        ("clip-average", "blocks.1", ["patches"], YES),
        ("clip-attention-pool", "blocks.1", ["patches"], YES),
        # Conv nets.
        ("resnet10t", "layer4", ["grid"], YES),
        ("resnet10t", "branch", ["grid"], YES),
        ("resnet10t", "layer1", ["grid"], YES),
        ("resnet10t", "pooled", ["pooled"], YES),
        ("convnext", "mlp", ["grid"], YES),
    ],
)
def test_what_the_output_can_change_with(
    name: str, site: str, kinds: Sequence[str], sees: bool, folder: Path
) -> None:
    backbone = backbone_of(name, folder)
    assert backbone.sees(site, kinds) == sees
    assert backbone.sees(site, tuple(reversed(kinds))) == sees


@pytest.mark.parametrize(
    ("features", "site", "kind", "sees"),
    [
        (("cls", "patches"), "blocks.2", "patches", YES),
        (("cls", "patches"), "normed", "patches", YES),
        (("cls", "patches"), "mlp", "patches", YES),
        (("cls", "patches"), "blocks.2", "registers", NO),
        (("cls", "patches"), "normed", "registers", NO),
        (("cls", "patches"), "blocks.1", "registers", YES),
        (("cls",), "blocks.2", "patches", NO),
        (("cls",), "blocks.2", "cls", YES),
        (("patches",), "normed", "cls", NO),
        (("patches",), "blocks.2", "cls", NO),
        (("patches",), "blocks.1", "cls", YES),
    ],
)
def test_what_a_linear_head_reads(
    features: Any, site: str, kind: str, sees: bool, folder: Path
) -> None:
    """And the embedding, which is the CLS token whatever a linear head reads."""
    whole = backbone_of("vit-registers", folder)
    backbone = load_backbone(replace(whole.spec, head=HeadSpec(features=features)))
    assert backbone.sees(site, [kind], "features") == sees
    of_embedding = kind == "cls" or site == "blocks.1"
    assert backbone.sees(site, [kind], "embedding") == of_embedding
    assert backbone.sees(site, [kind]) == (sees or of_embedding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit", "clip"])
def test_half_precision(name: str, dtype: torch.dtype, folder: Path) -> None:
    backbone = load_backbone(backbone_of(name, folder).spec, dtype=dtype)
    last = len([site for site in backbone.spec.sites if site.startswith("blocks.")]) - 1
    assert not backbone.sees(f"blocks.{last}", ["patches"])
    assert backbone.sees(f"blocks.{last}", ["cls"])
    assert backbone.sees(f"blocks.{last - 1}", ["patches"])


@pytest.mark.parametrize("name", ["vit", "dinov3-cls", "clip"])
def test_with_the_row_of_cls_alone(name: str, folder: Path) -> None:
    spec = backbone_of(name, folder).spec
    backbone = load_backbone(spec, last_block="cls")
    last = len([site for site in spec.sites if site.startswith("blocks.")]) - 1
    assert not backbone.sees(f"blocks.{last}", ["patches"])
    assert backbone.sees(f"blocks.{last}", ["cls"])
    assert backbone.sees(f"blocks.{last - 1}", ["patches"])


def test_it_is_found_once_and_leaves_the_model_alone(folder: Path) -> None:
    backbone = load_backbone(backbone_of("vit", folder).spec)
    x = images()
    before = backbone.forward(x)
    values = {name: value.clone() for name, value in backbone.model.module.state_dict().items()}
    random = torch.random.get_rng_state()
    ran: list[int] = []
    block: Any = backbone.model.module.get_submodule("blocks.0")
    handle = block.register_forward_hook(lambda *_: ran.append(1))
    for kinds in (["patches"], ["cls"], ["cls", "patches"], ["patches", "cls"], ["patches"]):
        backbone.sees("blocks.1", kinds)
    handle.remove()
    assert len(ran) == 3  # one pass over one image for each set of tokens
    assert torch.equal(torch.random.get_rng_state(), random)
    for module in backbone.model.module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module.training
    for name, value in backbone.model.module.state_dict().items():
        assert torch.equal(value, values[name])
    assert torch.equal(backbone.forward(x).embedding_bd, before.embedding_bd)


def test_a_site_or_tokens_that_are_not_there(folder: Path) -> None:
    backbone = backbone_of("vit", folder)
    with pytest.raises(NotFound, match=r"has no site 'blocks\.9'"):
        backbone.sees("blocks.9", ["cls"])
    with pytest.raises(UsageError, match=r"the site 'blocks\.1' of 'case' has no registers"):
        backbone.sees("blocks.1", ["cls", "registers"])
