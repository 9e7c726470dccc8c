"""What a model's name says of its weights: family, pretraining, corpus, paper, and their pixels.

The terms are those by which leaderboards group (docs/backbones.md). A name is matched as its
library writes it, with the tag: `vit_base_patch14_dinov2.lvd142m`, `ViT-B-16/openai`,
`imageomics/bioclip`. What is not known stays empty: an entry is complete without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Known:
    """pixels: what their makers' own pipeline has otherwise than the library that has them now.

    licence: of weights that open_clip names, which says none; '' where it is not known.
    """

    family: str = ""
    pretraining: str = ""
    corpus: str = ""
    paper: str = ""
    pixels: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""


_SQUASH = {"resize": "squash", "resize_to": None, "crop": False}  # big_vision's own
_256_224 = {"size": 224, "resize": "shortest", "resize_to": 256}  # torchvision's habit
_APACHE = "Apache-2.0"
_ARXIV = "https://arxiv.org/abs/"

# The first whose pattern is found in a name, in lower case, is the one.
_BY_NAME: tuple[tuple[str, Known], ...] = (
    (
        r"dinov3.*lvd1689m",
        Known("dinov3", "self-distillation", "lvd-1689m", _ARXIV + "2508.10104"),
    ),
    (
        r"reg4_dinov2",
        Known("dinov2", "self-distillation", "lvd-142m", _ARXIV + "2309.16588", _256_224),
    ),
    (
        r"dinov2",
        Known("dinov2", "self-distillation", "lvd-142m", _ARXIV + "2304.07193", _256_224),
    ),
    (
        r"\.dino$",
        Known("dino", "self-distillation", "imagenet-1k", _ARXIV + "2104.14294", _256_224),
    ),
    (
        r"\.mae$",
        Known("mae", "masked-autoencoding", "imagenet-1k", _ARXIV + "2111.06377", _256_224),
    ),
    (
        r"siglip2|siglip.*v2_webli",
        Known("siglip2", "sigmoid-contrastive", "webli", _ARXIV + "2502.14786", _SQUASH, _APACHE),
    ),
    (
        r"siglip",
        Known("siglip", "sigmoid-contrastive", "webli", _ARXIV + "2303.15343", _SQUASH, _APACHE),
    ),
    (
        r"imageomics/bioclip-2$",
        Known("bioclip", "contrastive", "laion-2b, then treeoflife-200m", _ARXIV + "2505.23883"),
    ),
    (
        r"imageomics/bioclip$",
        Known("bioclip", "contrastive", "wit-400m, then treeoflife-10m", _ARXIV + "2311.18803"),
    ),
    (
        r"(clip|^vit-|^rn).*[./]openai",
        Known("clip", "contrastive", "wit-400m", _ARXIV + "2103.00020", licence="MIT"),
    ),
    (
        r"(clip|^vit-|^rn).*laion2b",
        Known("clip", "contrastive", "laion-2b", _ARXIV + "2212.07143", licence="MIT"),
    ),
    (
        r"(clip|^vit-|^rn).*datacomp_?xl",
        Known("clip", "contrastive", "datacomp-1b", _ARXIV + "2304.14108", licence="MIT"),
    ),
    (r"clip", Known("clip", "contrastive")),
    (
        r"deit_.*fb_in1k",
        Known("deit", "supervised", "imagenet-1k", _ARXIV + "2012.12877", _256_224),
    ),
    (
        r"^vit_.*augreg2?_in21k",
        Known("vit", "supervised", "imagenet-21k", _ARXIV + "2106.10270"),
    ),
    (
        r"resnet50\.tv2_in1k",
        Known("resnet", "supervised", "imagenet-1k", pixels={"size": 224, "resize_to": 232}),
    ),
    (
        r"^resnet\d+\.tv_in1k",
        Known("resnet", "supervised", "imagenet-1k", _ARXIV + "1512.03385"),
    ),
    (
        r"^resnet\d+\.a[123]_in1k",
        Known("resnet", "supervised", "imagenet-1k", _ARXIV + "2110.00476"),
    ),
    (
        r"resnetv2.*bit\.goog_in21k",
        Known("bit", "supervised", "imagenet-21k", _ARXIV + "1912.11370"),
    ),
    (
        r"^convnext_\w+\.fb_in1k",
        Known("convnext", "supervised", "imagenet-1k", _ARXIV + "2201.03545"),
    ),
    (
        r"^convnext_\w+\.fb_in22k",
        Known("convnext", "supervised", "imagenet-22k", _ARXIV + "2201.03545"),
    ),
)

_CORPORA = {"in1k": "imagenet-1k", "in12k": "imagenet-12k", "in21k": "imagenet-21k"}


def known(name: str) -> Known:
    """What is known of a model by its name; all empty where nothing is."""
    found = next((k for pattern, k in _BY_NAME if re.search(pattern, name.lower())), Known())
    if found == Known() and (corpus := re.search(r"\.(?:\w+_)?(in1k|in12k|in21k)", name)):
        family = re.match(r"[a-z]+", name)
        found = Known(family.group() if family else "", "supervised", _CORPORA[corpus.group(1)])
    for tuned in re.findall(r"_ft_(in1k|in12k|in21k)", name):
        pretraining, corpus = found.pretraining, f"{found.corpus}, then {_CORPORA[tuned]}"
        if pretraining and not pretraining.endswith("supervised"):
            pretraining = f"{pretraining}, then supervised"
        # A fine-tune is its maker's, and so are its pixels.
        found = replace(found, pretraining=pretraining, corpus=corpus, pixels={})
    return found


_SIZES = {
    "tiny": "Ti",
    "small": "S",
    "base": "B",
    "large": "L",
    "huge": "H",
    "so400m": "SO400M",
    "giant": "g",
}
_SIZE = "|".join(_SIZES)


def architecture(name: str) -> str:
    """A model's architecture as a reader knows it, such as ViT-B/16; '' where it is not known."""
    if found := re.match(rf"(?:vit|deit)_({_SIZE})_(distilled_)?patch(\d+)(?:_reg(\d))?", name):
        size, distilled, patch, registers = found.groups()
        more = f" with {registers} registers" if registers else ""
        more += " with a distillation token" if distilled else ""
        return f"ViT-{_SIZES[size]}/{patch}{more}"
    if found := re.match(r"ViT-(\w+?)-(\d+)(?:-|/|$)", name):
        return f"ViT-{found.group(1)}/{found.group(2)}"
    if found := re.match(r"RN(\d+(?:x\d+)?)(?:-|/|$)", name):
        return f"ResNet-{found.group(1)} with attention pooling"
    if found := re.match(r"resnet(\d+)(?:\.|$)", name):
        return f"ResNet-{found.group(1)}"
    if found := re.match(r"resnetv2_(\w+)_bit", name):
        return f"ResNetV2-{found.group(1)}"
    if found := re.match(rf"convnext_({_SIZE})(?:\.|$)", name):
        return f"ConvNeXt-{_SIZES[found.group(1)]}"
    return ""
