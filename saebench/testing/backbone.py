"""Checks a backbone: it builds, its sites are as declared, resuming equals the full forward.

And so does a splice of the identity; which tokens of a site the output does not see is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from saebench.backbones import Backbone, load_backbone
from saebench.backbones.activations import shown
from saebench.data.access import Access
from saebench.registry import Registry
from saebench.testing.report import Check, attempt, of_which, real_images
from saebench.testing.splice import images_of, spliced_at
from saebench.weights import weights_of


def check_backbone(
    registry: Registry, name: str, *, access: Access | None = None
) -> Iterator[Check]:
    """Builds; its sites have their layout; resume and splice there give the forward's output."""
    spec = registry.buildable(name)
    held: dict[str, Any] = {}

    def build() -> str:
        backbone = held["backbone"] = load_backbone(spec)
        parameters = sum(p.numel() for p in backbone.model.module.parameters())
        weights = weights_of(spec)
        # Only a loader of one's own does without an entry's weights.
        own = () if weights.file or weights.hub else ("with the weights that its loader gives it",)
        said = (f"{parameters:,} parameters", shown(spec, backbone.model))
        return ", ".join((*said, *backbone.notes, *own))

    yield (built := attempt("builds, with its weights", build))
    if not built.passed:
        return
    backbone: Backbone = held["backbone"]

    def pixels() -> str:
        dataset, _, images_b3hw = real_images(backbone, registry, 8, access)
        held["images"] = images_b3hw
        shape = tuple(images_b3hw.shape[1:])
        assert shape == (3, spec.input.size, spec.input.size), f"its transform gives {shape}"
        return f"{shape} from {of_which(dataset, backbone)}"

    yield (looked := attempt("transforms real images", pixels))
    if not looked.passed:
        return
    images_b3hw = held["images"]
    assert isinstance(images_b3hw, torch.Tensor)
    clean = backbone.forward(images_b3hw)
    yield attempt("is deterministic", lambda: _same_output(clean, backbone.forward(images_b3hw)))
    if not spec.sites:
        yield Check("declares sites", False, f"{spec.path}: there is no [sites] table")
    for site, site_spec in spec.sites.items():

        def layout(site: str = site, site_spec: Any = site_spec) -> str:
            acts_btd = backbone.acts(images_b3hw, [site])[site].acts_btd
            expected = (len(images_b3hw), site_spec.tokens, site_spec.width)
            assert tuple(acts_btd.shape) == expected, f"{tuple(acts_btd.shape)}, not {expected}"
            assert torch.isfinite(acts_btd).all(), "NaN or infinite activations"
            kinds = {kind: part.stop - part.start for kind, part in site_spec.kinds.items()}
            return f"{expected[1]} tokens of width {expected[2]}: {kinds}"

        def resumed(site: str = site) -> str:
            captures = backbone.acts(images_b3hw, [site])
            capture = captures[site]
            text = _same_output(clean, backbone.resume(site, capture.acts_btd, capture.state))
            return text + spliced_at(images_of(backbone, captures, len(images_b3hw)), site)

        yield attempt(f"site {site}: layout", layout)
        yield attempt(f"site {site}: resume gives the full forward's output", resumed)
    if spec.base:
        yield attempt("its base is in the registry", lambda: registry.backbone(str(spec.base)).name)


def _same_output(a: Any, b: Any) -> str:
    gap = (a.embedding_bd - b.embedding_bd).abs().max().item()
    scale = a.embedding_bd.abs().max().item()
    assert gap <= 1e-5 * max(scale, 1e-12), f"differs by {gap:.3g} at a scale of {scale:.3g}"
    return "bit for bit" if gap == 0 else f"to {gap / scale:.1e} relative"
