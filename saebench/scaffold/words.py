"""What a checkpoint says of its training, in its maker's words, as names of the registry.

Only what is certain is taken: a repository or a model that one backbone has, a hook that is one
site, tokens that are one kind. What is merely alike is listed, for a person to choose from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from saebench.errors import SaebenchError, UsageError
from saebench.registry import Registry
from saebench.specs import BackboneSpec, SiteSpec

_PREFIXES = ("open-clip:", "open_clip:", "openclip:", "timm:", "hf-hub:", "hf_hub:")
# What the transformers library calls weights that the registry has from another repository.
_ALSO = {
    "openai/clip-vit-base-patch16": "clip-vit-b16-openai",
    "openai/clip-vit-base-patch32": "clip-vit-b32-openai",
    "openai/clip-vit-large-patch14": "clip-vit-l14-openai",
    "openai/clip-vit-large-patch14-336": "clip-vit-l14-336-openai",
    "facebook/dino-vitb16": "dino-vitb16",
    "facebook/dinov2-small": "dinov2-vits14",
    "facebook/dinov2-base": "dinov2-vitb14",
    "facebook/dinov2-large": "dinov2-vitl14",
    "facebook/dinov2-with-registers-base": "dinov2-vitb14-reg",
    "facebook/dinov2-with-registers-large": "dinov2-vitl14-reg",
}


def backbone_of(model: str, registry: Registry) -> tuple[str, list[str]]:
    """(the backbone that a model's name surely means, or ''; those that it may mean)."""
    said = model.strip().partition("@")[0]
    for prefix in _PREFIXES:
        said = said.removeprefix(prefix)
    backbones = list(_backbones(registry))
    sure = [one.name for one in backbones if said in _names(one) or one.name == _ALSO.get(said)]
    if len(sure) == 1:
        return sure[0], sure
    key = _key(said.rpartition("/")[2] if said.count("/") == 1 else said)
    alike = [one.name for one in backbones if _alike(key, one)]
    return "", sure or alike


def _backbones(registry: Registry) -> Iterator[BackboneSpec]:
    for name in registry.backbones:
        try:
            yield registry.backbone(name)
        except SaebenchError:
            continue  # an entry that cannot be read is nobody's backbone


def _names(spec: BackboneSpec) -> set[str]:
    """By which it is known for sure. A name of open_clip is not: its tag decides on the weights."""
    found = {spec.name, spec.weights.hub or ""}
    if spec.loader == "timm":
        found.add(spec.model)
        found.add((spec.weights.hub or "").removeprefix("timm/"))
    if spec.model.startswith("hf-hub:"):
        found.add(spec.model.removeprefix("hf-hub:").partition("@")[0])
    return found - {""}


def _alike(key: str, spec: BackboneSpec) -> bool:
    keys = {_key(name) for name in (spec.name, spec.model, spec.architecture)}
    return len(key) > 3 and any(key in other or other in key for other in keys if len(other) > 3)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def choose_backbone(model: str, registry: Registry) -> str:
    """The backbone that a checkpoint was trained on. Errors: UsageError listing those it may be."""
    sure, alike = backbone_of(model, registry) if model else ("", [])
    if sure:
        return sure
    said = f"its file names the model '{model}'" if model else "its file does not say"
    shown = alike or list(registry.backbones)
    kind = "it may be" if alike else "known"
    raise UsageError(
        f"which backbone was it trained on? {said}",
        f"--backbone NAME   ({kind}: {', '.join(shown[:8])}{', …' if len(shown) > 8 else ''}; "
        "saebench ls backbones)",
    )


_BLOCK = re.compile(r"(?:^|\.)(?:blocks|resblocks|layers?)\.(\d+)(?:\.hook_resid_post)?$")


def site_of(hook: str, spec: BackboneSpec) -> str:
    """The site that a hook's name means; '' where it is none of the backbone's for sure."""
    if hook in spec.sites:
        return hook
    if found := _BLOCK.search(hook):
        name = f"blocks.{found[1]}"
        return name if name in spec.sites else ""
    outputs = [n for n, site in spec.sites.items() if (site.path, site.side) == (hook, "output")]
    return outputs[0] if len(outputs) == 1 else ""


# As makers and their configurations write them, without underscores and hyphens.
_TOKENS = {
    "all": {"all", "all tokens"},
    "cls+patches": {"cls and patches", "cls + patches", "cls+patches"},
    "cls": {"cls", "cls only", "cls token", "cls token only", "class token", "class token only"},
    "patches": {
        "patches",
        "patch",
        "patches only",
        "use patches only",
        "patch tokens",
        "patch tokens only",
        "spatial",
        "spatial tokens",
    },
}


def tokens_of(words: str, site: SiteSpec) -> str:
    """The token kinds that words mean, as an entry says them; '' where that is not certain."""
    if words in site.kinds:
        return words
    plain = " ".join(re.sub(r"[_-]", " ", words.lower()).split())
    kinds = next((kinds for kinds, known in _TOKENS.items() if plain in known), "")
    if kinds == "patches" and "patches" not in site.kinds and "grid" in site.kinds:
        kinds = "grid"
    there = kinds == "all" or all(kind in site.kinds for kind in kinds.split("+"))
    return kinds if there else ""
