"""Texts that class names are put into for zero-shot classification."""

from __future__ import annotations

from saebench.errors import SpecError
from saebench.specs import DatasetSpec

SETS = {
    "openai_imagenet": "OPENAI_IMAGENET_TEMPLATES",  # the 80 of Radford et al. (2021)
    "simple": "SIMPLE_IMAGENET_TEMPLATES",  # the 7 of them that do best together
}
"""Name of a set -> its name in open_clip."""


def templates_of(spec: DatasetSpec) -> tuple[str, ...]:
    """The entry's templates, each with {} for the name. Errors: SpecError for an unknown set."""
    if not isinstance(spec.templates, str):
        return spec.templates
    if spec.templates not in SETS:
        raise SpecError(
            f"{spec.path or spec.name}: no set of templates is called '{spec.templates}'",
            f'sets: {", ".join(SETS)}; or write the texts: templates = ["a photo of a {{}}."]',
        )
    import open_clip  # imports torch, so only when texts are asked for

    return tuple(template("{}") for template in getattr(open_clip, SETS[spec.templates]))
