"""Full-size built-in backbones, random weights: activations, and outputs resumed from them.

acts equals what a plain forward hook of the upstream library sees, and resume equals the library's
own output, at every declared site. Those that share an architecture are run once. Small ones run by
default, the rest are slow. The largest are given one image, and resumed at every fourth block and
at their last four sites: a resumed pass costs as much as a forward, and they have up to 29 sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saebench.backbones import Backbone
from saebench.specs import BackboneSpec
from tests.backbone_cases import randomise
from tests.registry_models import ENTRIES, OF_A_HUB, model_of

QUICK = ("clip-vit-b32-openai", "dinov2-vits14-reg")


def _architectures() -> dict[str, list[str]]:
    """The entry of most sites of each architecture -> all, whatever their number of classes."""
    found: dict[Any, list[str]] = {}
    for name, spec in ENTRIES.items():
        model = OF_A_HUB.get(name, spec.model).replace("SigLIP2", "SigLIP")  # their texts differ
        found.setdefault((model, spec.input.size), []).append(name)
    return {max(names, key=lambda n: len(ENTRIES[n].sites)): names for names in found.values()}


ARCHITECTURES = _architectures()


def test_every_entry_is_run_through_one_of_its_architecture() -> None:
    assert sorted(chain(*ARCHITECTURES.values())) == sorted(ENTRIES)
    assert set(QUICK) <= set(ARCHITECTURES)
    for name, others in ARCHITECTURES.items():
        for other in others:
            assert ENTRIES[other].sites.items() <= ENTRIES[name].sites.items()


def upstream_output(module: Any, spec: BackboneSpec, images_b3hw: Tensor) -> Tensor:
    """What the library itself makes of images: logits, or where it has none the embedding."""
    return module(images_b3hw) if spec.loader == "timm" else module.encode_image(images_b3hw)


def hooked(module: nn.Module, spec: BackboneSpec, images_b3hw: Tensor) -> Mapping[str, Tensor]:
    """What plain forward hooks of the library see, [b t d], in one pass of its own."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, site in spec.sites.items():

        def keep(_: nn.Module, __: Any, x: Any, name: str = name) -> None:
            assert name not in seen
            seen[name] = x.clone()

        handles.append(module.get_submodule(site.path).register_forward_hook(keep))
    with torch.inference_mode():
        upstream_output(module, spec, images_b3hw)
    for handle in handles:
        handle.remove()
    return {name: as_tokens(x, spec.sites[name].layout) for name, x in seen.items()}


def as_tokens(x: Tensor, layout: str) -> Tensor:
    """[b t d] of what a module returns."""
    if layout == "map":
        return x.flatten(2).mT
    return x[:, None] if layout == "pooled" else x


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ARCHITECTURES]
)
def test_acts_and_resume_at_every_site(name: str, tmp_path: Path) -> None:
    spec = ENTRIES[name]
    model = model_of(spec, tmp_path, values=False)
    module: Any = randomise(model.module).eval()
    large = sum(p.numel() for p in (model.tower or module).parameters()) > 1e8
    n_images = 1 if large else 2
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n_images, 3, spec.input.size, spec.input.size, generator=generator)

    with torch.inference_mode():
        wanted = upstream_output(module, spec, images)
    assert torch.isfinite(wanted).all()
    expected = hooked(module, spec, images)

    backbone = Backbone(spec, model)
    captures = backbone.acts(images, list(spec.sites))
    for i, (site, layout) in enumerate(spec.sites.items()):
        acts_btd = captures[site].acts_btd
        assert acts_btd.shape == (n_images, layout.tokens, layout.width)
        assert torch.equal(acts_btd, expected[site]), site
        if large and i % 4 and i < len(spec.sites) - 4:
            continue
        # A reconstruction is a new, contiguous tensor, whatever the captured one was.
        given = acts_btd.clone(memory_format=torch.contiguous_format)
        output = backbone.resume(site, given, captures[site].state)
        found = output.embedding_bd if output.logits_bc is None else output.logits_bc
        assert torch.equal(found, wanted), site
