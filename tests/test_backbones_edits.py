"""Activations changed at several sites in one pass: the same as plain forward hooks upstream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saebench.backbones import Backbone, Output, Step, SteppedModel, load_backbone
from saebench.errors import Mismatch, NotFound, UsageError
from saebench.specs import BackboneSpec, InputSpec, SiteSpec
from tests.backbone_cases import CASES, backbone_of, images, upstream

Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("edits")


# Of single values, so that they mean the same in every layout; no two commute.
CHANGES: tuple[Change, ...] = (
    lambda x: 0.5 * x + 0.1,
    lambda x: x.abs() - 0.3,
    lambda x: (2 * x).sin(),
)


def plain(model: Any, loader: str, x: Tensor, changes: Mapping[SiteSpec, Change]) -> Tensor:
    """The slow script: the whole model, with a hook for each site."""
    with ExitStack() as hooks, torch.inference_mode():
        for site, change in changes.items():

            def before(_: nn.Module, args: Any, change: Change = change) -> Any:
                new = change(args[0])  # attention is given one tensor three times
                return tuple(new if value is args[0] else value for value in args)

            def after(_: nn.Module, args: Any, output: Any, change: Change = change) -> Any:
                if isinstance(output, tuple):
                    return (change(output[0]), *output[1:])
                return change(output)

            module = model.get_submodule(site.path)
            if site.side == "input":
                handle = module.register_forward_pre_hook(before)
            else:
                handle = module.register_forward_hook(after)
            hooks.callback(handle.remove)
        return model(x) if loader == "timm" else model.encode_image(x)


def said_of(output: Output) -> Tensor:
    return output.embedding_bd if output.logits_bc is None else output.logits_bc


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("vit", ["blocks.0", "blocks.1"]),
        ("vit", ["patches", "normed"]),
        ("vit", ["blocks.0", "mlp"]),
        ("vit", ["attn", "blocks.2"]),
        ("vit", ["attn", "mlp"]),
        ("vit", ["attn", "hidden"]),  # both in one block
        ("vit", ["blocks.0", "attn", "hidden"]),
        ("vit", ["mlp in", "mlp"]),
        ("vit", ["blocks.1", "mlp", "fc_norm"]),
        ("vit", ["blocks.1", "head"]),
        ("vit-registers", ["blocks.0", "blocks.1", "normed"]),
        ("deit-distilled", ["blocks.0", "mlp", "normed"]),
        ("dinov3", ["blocks.0", "attn", "blocks.2"]),
        ("dinov3", ["patches", "attn in", "mlp"]),
        ("clip", ["blocks.0", "blocks.1"]),
        ("clip", ["blocks.0", "attn"]),
        ("clip", ["mlp", "blocks.1", "normed"]),
        ("clip", ["mlp", "attn in", "embedding"]),
        ("clip-trunk-classifier", ["mlp", "blocks.1", "trunk"]),
        ("siglip", ["blocks.0", "attn", "pool"]),
        ("resnet10t", ["layer1", "layer3"]),
        ("resnet10t", ["layer1", "branch", "layer4"]),
        ("resnet-bottleneck", ["branch", "layer3", "pooled"]),
        ("resnet-bottleneck", ["stem", "shortcut", "read"]),
        ("convnext", ["stem", "mlp", "stages.3"]),
        ("convnext", ["depthwise", "norm", "pooled"]),
        ("mobilenetv2", ["blocks.0", "bn in block", "last"]),
        ("clip-resnet", ["branch", "layer3", "attnpool"]),
    ],
)
def test_several_sites_at_once_are_plain_hooks_upstream(
    name: str, sites: list[str], folder: Path
) -> None:
    backbone, case = backbone_of(name, folder), CASES[name]
    x = images(size=case.size)
    changes = dict(zip(sites, CHANGES, strict=False))
    wanted = plain(
        upstream(case, folder / name),
        case.loader,
        x,
        {case.sites[site]: change for site, change in changes.items()},
    )
    first, *later = sites
    capture = backbone.acts(x, [first])[first]
    acts_btd = changes[first](capture.acts_btd)
    before = acts_btd.clone()
    for order in (later, later[::-1]):
        edits = {site: changes[site] for site in order}
        found = backbone.resume(first, acts_btd, capture.state, edits)
        assert torch.equal(said_of(found), wanted)
    assert torch.equal(acts_btd, before)
    # Each of them counts.
    for site in later:
        edits = {other: changes[other] for other in later if other != site}
        found = backbone.resume(first, acts_btd, capture.state, edits)
        assert not torch.equal(said_of(found), wanted), site


def test_an_edit_is_given_what_the_earlier_ones_made(folder: Path) -> None:
    """All tokens as they arrive: the activations of a pass that is changed before."""
    backbone, x = backbone_of("vit", folder), images()
    capture = backbone.acts(x, ["blocks.0"])["blocks.0"]
    changed_btd = CHANGES[0](capture.acts_btd)
    seen: dict[str, Tensor] = {}

    def keep(name: str, change: Change) -> Change:
        def edit(acts_btd: Tensor) -> Tensor:
            seen[name] = acts_btd.clone()
            return change(acts_btd)

        return edit

    edits = {"mlp": keep("mlp", CHANGES[2]), "blocks.1": keep("blocks.1", CHANGES[1])}
    backbone.resume("blocks.0", changed_btd, {}, edits)
    blocks: Any = upstream(CASES["vit"], folder / "vit").blocks
    with torch.inference_mode():
        first = blocks[1](changed_btd)
        assert torch.equal(seen["blocks.1"], first)
        y = CHANGES[1](first)
        y = y + blocks[2].attn(blocks[2].norm1(y))
        assert torch.equal(seen["mlp"], blocks[2].mlp(blocks[2].norm2(y)))


def test_only_some_tokens_of_a_later_site(folder: Path) -> None:
    backbone, x = backbone_of("clip", folder), images()
    model = upstream(CASES["clip"], folder / "clip")

    def no_cls(acts_btd: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(acts_btd[:, :1]), acts_btd[:, 1:]], dim=1)

    sites = CASES["clip"].sites
    changes = {sites["pre"]: CHANGES[0], sites["blocks.0"]: no_cls}
    capture = backbone.acts(x, ["pre"])["pre"]
    output = backbone.resume("pre", CHANGES[0](capture.acts_btd), {}, {"blocks.0": no_cls})
    assert torch.equal(output.embedding_bd, plain(model, "open_clip", x, changes))


FEW = ["vit", "vit-registers", "dinov3", "clip", "siglip", "resnet-bottleneck", "convnext"]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("new", [False, True])
def test_edits_that_change_nothing_leave_the_last_bit(name: str, new: bool, folder: Path) -> None:
    """Also as new tensors [b t d], which lie in memory otherwise than a map."""
    backbone = backbone_of(name, folder)
    x = images(size=CASES[name].size)
    full = backbone.forward(x)
    captures = backbone.acts(x, list(backbone.spec.sites))

    def same(acts_btd: Tensor) -> Tensor:
        return acts_btd.clone(memory_format=torch.contiguous_format) if new else acts_btd

    order = backbone.in_order(captures)
    for i, site in enumerate(order):
        edits, taken = {}, {backbone._sites.depth(site)}
        for later in order[i + 1 :]:
            if backbone._sites.depth(later) not in taken:
                taken.add(backbone._sites.depth(later))
                edits[later] = same
        capture = captures[site]
        output = backbone.resume(site, capture.acts_btd, capture.state, edits)
        assert torch.equal(output.embedding_bd, full.embedding_bd), (site, list(edits))


def test_half_precision_takes_what_an_sae_gives(folder: Path) -> None:
    backbone = load_backbone(backbone_of("vit", folder).spec, dtype=torch.bfloat16)
    x = images()
    capture = backbone.acts(x, ["blocks.0"])["blocks.0"]
    wide = backbone.resume(
        "blocks.0", capture.acts_btd, {}, {"blocks.1": Tensor.float, "mlp": Tensor.float}
    )
    assert torch.equal(wide.embedding_bd, backbone.forward(x).embedding_bd)


@pytest.mark.parametrize(
    ("site", "edited", "message"),
    [
        ("blocks.1", "blocks.0", "does not come after the site 'blocks.1'"),
        ("blocks.2", "mlp", "does not come after the site 'blocks.2'"),
        ("blocks.2", "all blocks", "does not come after the site 'blocks.2'"),
        ("mlp", "mlp", "does not come after the site 'mlp'"),
        ("mlp", "mlp in", "does not come after the site 'mlp'"),
        ("hidden", "attn", "does not come after the site 'hidden'"),
    ],
)
def test_an_edit_at_an_earlier_site(site: str, edited: str, message: str, folder: Path) -> None:
    backbone, x = backbone_of("vit", folder), images()
    capture = backbone.acts(x, [site])[site]
    with pytest.raises(UsageError) as error:
        backbone.resume(site, capture.acts_btd, capture.state, {edited: CHANGES[0]})
    assert message in str(error.value)
    assert f"site '{edited}'" in str(error.value)
    assert "resume at the earlier one" in str(error.value)


def test_two_edits_at_one_place(folder: Path) -> None:
    backbone = backbone_of("vit", folder)
    acts_btd = backbone.acts(images(), ["blocks.0"])["blocks.0"].acts_btd
    edits = {"blocks.2": CHANGES[0], "all blocks": CHANGES[1]}
    with pytest.raises(UsageError, match="is the same place as the site 'blocks"):
        backbone.resume("blocks.0", acts_btd, {}, edits)


def test_an_edit_at_no_site_and_of_another_shape(folder: Path) -> None:
    backbone = backbone_of("vit", folder)
    acts_btd = backbone.acts(images(), ["blocks.0"])["blocks.0"].acts_btd
    with pytest.raises(NotFound, match=r"has no site 'blocks\.9'"):
        backbone.resume("blocks.0", acts_btd, {}, {"blocks.9": CHANGES[0]})
    for site in ("blocks.1", "mlp"):
        with pytest.raises(Mismatch, match=rf"site '{site}'.*given activations are \[3, 16, 24\]"):
            backbone.resume("blocks.0", acts_btd, {}, {site: lambda x: x[:, 1:]})
    clean = backbone.forward(images())  # no hook was left behind
    assert torch.equal(backbone.resume("blocks.0", acts_btd, {}).embedding_bd, clean.embedding_bd)


class Backwards(nn.Module):
    """A block that runs its second layer first."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


def test_modules_that_do_not_run_in_the_order_of_their_declaration() -> None:
    block = Backwards()
    sites = {
        name: SiteSpec(path=name, kind="branch", layout="pooled", width=3)
        for name in ("second", "first")
    }
    spec = BackboneSpec(name="own", loader="x:y", model="", input=InputSpec(size=8), sites=sites)
    steps = (Step(lambda x: x.mean((2, 3))), Step(block, modules=tuple(sites)))
    backbone = Backbone(spec, SteppedModel(module=block, steps=steps, read=Output))
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    captures = backbone.acts(x, ["first", "second"])
    first, second = captures["first"], captures["second"]
    with pytest.raises(UsageError, match=r"site 'first'.* does not come after the site 'second'"):
        backbone.resume("second", second.acts_btd, second.state, {"first": lambda x: x})
    with pytest.raises(UsageError, match=r"site 'second'.* does not come after the site 'first'"):
        backbone.resume("first", first.acts_btd, first.state, {"second": lambda x: x})


def test_sites_in_the_order_of_a_pass(folder: Path) -> None:
    backbone = backbone_of("vit", folder)
    order = ["patches", "embedded", "first", "blocks.0", "attn", "hidden", "blocks.1"]
    order += ["mlp in", "mlp", "blocks.2", "normed", "fc_norm"]
    for seed in range(5):
        shuffled = [order[i] for i in torch.randperm(len(order), generator=seeded(seed)).tolist()]
        assert backbone.in_order(shuffled) == order
        assert backbone.deepest(shuffled) == "fc_norm"
    assert backbone.deepest(["mlp", "blocks.1", "attn"]) == "mlp"
    assert backbone.deepest(["mlp", "blocks.2"]) == "blocks.2"
    assert backbone.in_order([]) == []
    with pytest.raises(NotFound, match=r"has no site 'block\.2'"):
        backbone.in_order(["block.2"])
    with pytest.raises(NotFound, match=r"has no site 'block\.2'"):
        backbone.deepest(["blocks.1", "block.2"])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", [*FEW, "resnetv2", "mobilenetv4", "eva02"])
def test_the_order_is_that_in_which_modules_run(name: str, folder: Path) -> None:
    """What a plain hook upstream sees first comes first."""
    backbone, case = backbone_of(name, folder), CASES[name]
    ran: list[str] = []
    model = upstream(case, folder / name)
    for site, spec in case.sites.items():
        module = model.get_submodule(spec.path)
        if spec.side == "input":
            module.register_forward_pre_hook(lambda *_, site=site: ran.append(site))
        else:
            module.register_forward_hook(lambda *_, site=site: ran.append(site))
    plain(model, case.loader, images(size=case.size), {})
    depths = [backbone._sites.depth(site) for site in ran]
    assert depths == sorted(depths)
