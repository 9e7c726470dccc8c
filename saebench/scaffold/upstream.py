"""What timm, open_clip or a hub repository says of a model, as the whole entry of a backbone.

    timm:vit_base_patch16_224.augreg_in21k        a name with its tag; without: the default tag
    open_clip:ViT-B-16/datacomp_xl_s13b_b90k      a name and its tag
    hf-hub:owner/name                             a repository in timm's or open_clip's form; with
                                                  @revision, if not the default branch's

The pixels, the hub's name and the licence are those of the library's own pretrained configuration;
activation function, sites, tokens and head those of the model, which is built with random weights.
A file of one's own weights (a fine-tune) takes the place of the hub's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from saebench.backbones import SteppedModel, build_module, stepped
from saebench.backbones.activations import activations_of, image_activations
from saebench.backbones.describe import site_specs
from saebench.errors import SpecError, UsageError
from saebench.scaffold import relative
from saebench.scaffold.known import Known, architecture, known
from saebench.scaffold.pixels import open_clip_pixels, timm_pixels
from saebench.specs import BackboneSpec, HeadSpec, InputSpec, SiteSpec, WeightsSpec
from saebench.weights import file_sha256

_LICENCES = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "dinov3-license": "DINOv3 License",
}
_QUICK_GELU = "QuickGELU weights: the plain name would build the exact GELU."


@dataclass(frozen=True)
class Found:
    """What a library says of a model, before it is built. `known` is what its name says.

    notes: table of the entry -> where it is otherwise than the library has it ('': at the top).
    """

    loader: str
    model: str
    known: Known
    pixels: InputSpec
    architecture: str = ""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    weights: WeightsSpec = field(default_factory=WeightsSpec)
    licence: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)


def described(
    source: str, name: str, path: Path, *, file: Path | None = None, loader: str | None = None
) -> tuple[BackboneSpec, Mapping[str, str]]:
    """The entry `name` at `path` of a model, and what is to be noted in it, by table.

    file: weights that take the place of the hub's. loader: of a repository that has both forms.
    Errors: UsageError for a source that is none; SpecError for a model that cannot be built, or
    whose forward pass is not known; WeightsError where a hub cannot be asked.
    """
    kind, _, what = source.partition(":")
    if loader is not None and kind != "hf-hub":
        raise UsageError(f"--loader is of a hub repository, and --from is {source}", "leave it out")
    if kind == "timm" and what:
        found = _timm(what, file)
    elif kind == "open_clip" and what:
        found = _open_clip(what, file)
    elif kind == "hf-hub" and what.count("/") == 1:
        found = _hub(what, loader, name)
    else:
        raise UsageError(
            f"--from {source} is no model",
            "timm:NAME.TAG, open_clip:NAME/TAG or hf-hub:OWNER/NAME",
        )
    weights = found.weights
    if file is not None:
        weights = WeightsSpec(file=relative(file, path.parent), sha256=file_sha256(file))
    spec = BackboneSpec(
        name=name,
        path=str(path),
        family=found.known.family,
        architecture=found.architecture,
        pretraining=found.known.pretraining,
        corpus=found.known.corpus,
        loader=found.loader,
        model=found.model,
        model_args=found.model_args,
        weights=weights,
        input=found.pixels,
        dataset="inat21" if found.known.family == "bioclip" else "imagenet-1k",
        licence=found.licence if file is None else "",
        paper=found.known.paper,
    )
    return _built(spec), found.notes


def _built(spec: BackboneSpec) -> BackboneSpec:
    """The entry with what only the model itself says: activation, sites, head."""
    made = build_module(spec)
    assert not hasattr(made, "spec")  # only a function of the user's makes a Backbone
    model = made if isinstance(made, SteppedModel) else stepped(made, spec)  # type: ignore[arg-type]
    sites = site_specs(model, spec.input.size)
    activation = _only(image_activations(model))
    texts = _only(activations_of(model.text_tower)) if model.text_tower is not None else None
    said = texts == activation and model.grid is not None
    return replace(
        spec,
        activation=activation,
        text_activation=None if said else texts,
        sites=sites,
        site=default_site(sites),
        head=_head(spec, model),
    )


def _only(activations: set[str]) -> Any:
    return next(iter(activations)) if len(activations) == 1 else None


def default_site(sites: Mapping[str, SiteSpec]) -> str:
    """The second to last block or stage: the field's habit, and not yet the head's own."""
    deep = [name for name in sites if name.rstrip("0123456789") in ("blocks.", "layer", "stages.")]
    return deep[-2] if len(deep) > 1 else next(iter(sites), "")


def _head(spec: BackboneSpec, model: SteppedModel) -> HeadSpec:
    if model.text is not None:
        return HeadSpec(kind="zero_shot")
    projects = spec.pretraining in ("contrastive", "sigmoid-contrastive")
    if model.n_classes == 0 or projects:  # timm keeps a CLIP's projection where others classify
        return HeadSpec()
    in1k = spec.weights.hub is not None and spec.corpus.endswith("imagenet-1k")
    imagenet = in1k and model.n_classes == 1000
    return HeadSpec(kind="classifier", classes={"imagenet-1k": (0, 1000)} if imagenet else {})


def _timm(name: str, file: Path | None) -> Found:
    import timm

    from saebench.backbones import timm_build

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise UsageError(f"timm has no model '{base}'", timm_build.nearest_models(base))
    # OpenAI's weights and others of its kind are QuickGELU, and timm has a name of its own for the
    # models that are so too.
    quick = base.replace("_clip_", "_clip_quickgelu_")
    tags = timm.list_pretrained(f"{base}.*")
    if tag and f"{base}.{tag}" not in tags:
        near = get_close_matches(f"{base}.{tag}", tags, n=3, cutoff=0.0)
        hint = f"the nearest: {', '.join(near)}" if near else f"--from timm:{base} --weights FILE"
        raise UsageError(f"timm has no weights '{name}'", hint)
    if quick != base and f"{quick}.{tag}" in timm.list_pretrained(f"{quick}.*"):
        base = quick
    config = timm.get_pretrained_cfg(f"{base}.{tag}" if tag else base)
    if config is None or (file is None and not config.hf_hub_id):
        raise UsageError(
            f"timm has no weights of '{name}' on the hub", "name yours with --weights FILE"
        )
    label = f"{base}.{config.tag}"
    return _timm_found(base, config.to_dict(), known(label), label, file)


def _timm_found(
    model: str, config: Mapping[str, Any], facts: Known, label: str, file: Path | None
) -> Found:
    """model: without a tag. It is built as its default tag: what differs becomes an argument."""
    import timm

    default = timm.get_pretrained_cfg(model)
    default_pixels = timm_pixels(config, label)
    pixels = replace(default_pixels, **facts.pixels)
    notes = {"": _QUICK_GELU} if "quickgelu" in model else {}
    if pixels != default_pixels:
        to = default_pixels.resize_to or default_pixels.size
        notes["input"] = (
            f"The makers' own; timm's default is {default_pixels.resize} {to}, "
            f"{default_pixels.size} pixels."
        )
    args: dict[str, Any] = {}
    n_classes = config.get("num_classes", 0)
    if file is not None:
        n_classes = _classes_in(file, config.get("classifier"), n_classes)
    if default is None or n_classes != default.num_classes:
        args["num_classes"] = n_classes
    if config.get("fixed_input_size") and (default is None or default.input_size[1] != pixels.size):
        args["img_size"] = pixels.size
    return Found(
        loader="timm",
        model=model,
        known=facts,
        architecture=architecture(label),
        pixels=pixels,
        model_args=args,
        weights=WeightsSpec(
            hub=config.get("hf_hub_id") or None, filename=config.get("hf_hub_filename") or None
        ),
        licence=_LICENCES.get(config.get("license") or "", config.get("license") or ""),
        notes=notes,
    )


def _classes_in(file: Path, classifier: Any, n_classes: int) -> int:
    """How many classes a file's classifier has: those of a fine-tune are its own."""
    from timm.models import clean_state_dict

    from saebench.backbones.checkpoint import read_tensors

    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    tensors = clean_state_dict(read_tensors(file))
    found = [tensors[f"{name}.weight"].shape[0] for name in names if f"{name}.weight" in tensors]
    return int(found[0]) if found else (0 if names else n_classes)


def _open_clip(name: str, file: Path | None) -> Found:
    import open_clip

    from saebench.backbones import open_clip_build

    model, _, tag = name.partition("/")
    if model not in open_clip.list_models():
        raise UsageError(f"open_clip has no model '{model}'", open_clip_build.nearest_models(model))
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags and (tag or file is None):
        raise UsageError(
            f"open_clip has no weights '{name}'",
            f"--from open_clip:{model}/TAG; the tags: {', '.join(tags) or 'none'}",
        )
    config: Mapping[str, Any] = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    hub = str(config.get("hf_hub") or "")
    if file is None and not hub:
        raise UsageError(f"the weights '{name}' are not on a hub", "name yours with --weights FILE")
    args: dict[str, Any] = {}
    built: Mapping[str, Any] = open_clip.get_model_config(model) or {}
    if config.get("quick_gelu") and not built.get("quick_gelu"):
        # open_clip only warns of it, and builds the exact GELU.
        if f"{model}-quickgelu" in open_clip.list_models():
            model = f"{model}-quickgelu"
        else:
            args["force_quick_gelu"] = True
    facts = known(name)
    owner, _, rest = hub.partition("/")
    repo, _, filename = rest.partition("/")
    return Found(
        loader="open_clip",
        model=model,
        known=facts,
        architecture=architecture(model),
        pixels=open_clip_pixels(built, config, name),
        model_args=args,
        weights=WeightsSpec(hub=f"{owner}/{repo}" if hub else None, filename=filename or None),
        licence=facts.licence,
        notes={"": _QUICK_GELU} if config.get("quick_gelu") else {},
    )


_FILES = {"open_clip": "open_clip_config.json", "timm": "config.json"}


def _hub(what: str, loader: str | None, name: str) -> Found:
    from saebench.hub import Wanted, fetch

    repo, _, revision = what.partition("@")
    names = tuple(_FILES.values()) if loader is None else (_FILES[loader],)
    file = fetch(Wanted(repo=repo, names=names, by=name, revision=revision))
    config = json.loads(file.read_text(encoding="utf-8"))
    facts = known(repo)
    if file.name == _FILES["open_clip"]:
        found = Found(
            loader="open_clip",
            model=f"hf-hub:{repo}",
            known=facts,
            pixels=open_clip_pixels(config["model_cfg"], config.get("preprocess_cfg", {}), repo),
        )
    elif "architecture" in config:
        pretrained = {**config, **config.get("pretrained_cfg", {})}
        label = f"{config['architecture']}.{pretrained.get('tag') or ''}"
        # What the repository says of its pixels holds: they may be a fine-tune's.
        facts = replace(known(label), pixels={})
        found = replace(
            _timm_found(config["architecture"], pretrained, facts, label, None),
            model=f"hf-hub:{repo}",
            model_args={},
        )
    else:
        raise SpecError(
            f"{repo}: its config.json is not timm's (there is no 'architecture')",
            "a model of another library needs a loader of your own: docs/add_a_backbone.md",
        )
    weights = WeightsSpec(hub=repo, revision=revision or None)
    return replace(found, weights=weights, licence="")
