"""What an entry says of a model, checked against the model that was built, before any image.

Sites (kind, token layout), the head, the image size. What only activations can show (shapes at a
site) is checked on every batch, in `sites`.
"""

from __future__ import annotations

from saebench.backbones.steps import SteppedModel, place_of
from saebench.errors import SpecError
from saebench.specs import BackboneSpec, SiteSpec


def check_entry(spec: BackboneSpec, model: SteppedModel) -> None:
    """Errors: SpecError naming the key of the entry and what the model has instead."""
    where = spec.path or spec.name
    size = (spec.input.size, spec.input.size)
    if model.image_size not in (None, size):
        raise SpecError(
            f"{where}: input.size = {spec.input.size}, and the model takes {model.image_size}",
            "correct input.size, or the image size in model_args",
        )
    if spec.input.size % model.multiple:
        raise SpecError(
            f"{where}: input.size = {spec.input.size}, and the model takes whole patches: "
            f"multiples of {model.multiple}",
            f"the next is {-(-spec.input.size // model.multiple) * model.multiple}",
        )
    for name, site in spec.sites.items():
        check_site(site, model, f"{where}: site '{name}'")
    _check_head(spec, model, where)


def check_site(site: SiteSpec, model: SteppedModel, where: str) -> None:
    """Errors: SpecError for a site of another kind, or with other tokens, than the model's."""
    place = place_of(model, site.path, site.side, where)
    found = "bottleneck" if place.module is None else "branch"
    # A model of a single step leaves the kind to its entry: all lies within that step.
    if site.kind != found and len(model.steps) > 1:
        raise SpecError(
            f"{where}: kind = '{site.kind}', and the {site.side} of '{site.path}' is a {found}",
            f'say kind = "{found}"' if found == "branch" else 'leave kind out, or "bottleneck"',
        )
    if site.layout == "tokens" and model.grid is not None:
        _check_tokens(site, model, model.grid, where)


def _check_tokens(site: SiteSpec, model: SteppedModel, grid: tuple[int, int], where: str) -> None:
    patches = {"patches": grid[0] * grid[1]}
    own = {kind: count for kind, count in {**model.prefix, **patches}.items() if count}
    said = {kind: part.stop - part.start for kind, part in site.kinds.items()}
    # Where all is the same in number it is surely wrong. Otherwise a bottleneck is: the sequence,
    # or its patches before a prefix is added. What a branch passes on may be something else.
    same_number = sum(own.values()) == site.tokens
    if said != own and (same_number or (site.kind == "bottleneck" and said != patches)):
        raise SpecError(
            f"{where}: its tokens are {_counts(said)}, and the model's are {_counts(own)}",
            f"the model's grid is {list(grid)}",
        )
    if "patches" in said and site.grid != grid and said["patches"] == patches["patches"]:
        raise SpecError(
            f"{where}: grid = {list(site.grid or ())}, and the model's is {list(grid)}",
            f"write grid = {list(grid)}",
        )


def _check_head(spec: BackboneSpec, model: SteppedModel, where: str) -> None:
    if spec.head.kind == "zero_shot" and model.text is None:
        raise SpecError(
            f"{where}: head.kind = 'zero_shot', and the model has no text tower",
            'use kind = "none", or "classifier"',
        )
    _check_features(spec, model, where)
    if spec.head.kind != "classifier":
        return
    if model.n_classes == 0:
        raise SpecError(
            f"{where}: head.kind = 'classifier', and the model has none",
            'set model_args.num_classes, or use kind = "none"',
        )
    for dataset, (first, count) in spec.head.classes.items():
        if first < 0 or count < 1 or first + count > model.n_classes:
            raise SpecError(
                f"{where}: head.classes.{dataset} = [{first}, {count}] is not within "
                f"the model's {model.n_classes} classes",
                "write [first, count]: where the dataset's classes begin, and how many there are",
            )


def _check_features(spec: BackboneSpec, model: SteppedModel, where: str) -> None:
    features = spec.head.features
    if features == ("embedding",):
        return
    said = f"{where}: head.features = {list(features)}"
    if model.sequence is None:
        raise SpecError(
            f"{said}, and the model has no final, normed sequence of tokens",
            'leave features out, or write ["embedding"]',
        )
    if not 0 <= model.sequence <= len(model.steps):
        raise SpecError(
            f"{where}: the model's sequence = {model.sequence} is not one of its boundaries",
            f"the input of its first step is 0, and the output of its last is {len(model.steps)}",
        )
    if "cls" in features and not model.prefix.get("cls"):
        raise SpecError(f"{said}, and the model has no CLS token", 'write ["patches"]')
    if "patches" in features and model.grid is None:
        raise SpecError(
            f"{said}, and the model does not say how many patches it has",
            "give its SteppedModel a grid",
        )


def _counts(tokens: dict[str, int]) -> str:
    return " + ".join(f"{count} {kind}" for kind, count in tokens.items() if count) or "none"
