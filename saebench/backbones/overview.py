"""The table of built-in backbones in docs/backbones.md, and the terms that it is grouped by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from saebench.specs import BackboneSpec

PRETRAININGS = {
    "contrastive": "images and their captions, softmax over the batch (CLIP)",
    "sigmoid-contrastive": "images and their captions, each pair alone (SigLIP)",
    "self-distillation": "images alone, a student after its own average (DINO)",
    "masked-autoencoding": "images alone, hidden patches are drawn (MAE)",
    "supervised": "images and their classes",
}
CORPORA = {
    "wit-400m": "400 million pairs, OpenAI's",
    "laion-2b": "2 billion pairs, the English part of LAION-5B",
    "datacomp-1b": "1.4 billion pairs that DataComp's best filter keeps",
    "webli": "WebLI, Google's pairs",
    "treeoflife-10m": "10 million images of 450,000 taxa",
    "treeoflife-200m": "214 million images of 952,000 taxa",
    "lvd-142m": "142 million images, curated for DINOv2",
    "lvd-1689m": "1.7 billion images, curated for DINOv3",
    "imagenet-1k": "1.3 million images of 1,000 classes",
    "imagenet-21k": "14 million images of 21,843 classes",
}


_COLUMNS = (
    "name",
    "family",
    "architecture",
    "pretraining",
    "corpus",
    "tokens",
    "pixels",
    "head",
    "base",
    "licence",
)


def backbones_table(specs: Iterable[BackboneSpec]) -> str:
    """A row for each backbone that is not embedded, in Markdown, by family."""
    rows = sorted((s for s in specs if not s.embedded), key=lambda s: (s.family, s.name))
    return "\n".join(_table(rows))


def terms_table() -> str:
    """What the terms of pretraining and corpus mean, in Markdown."""
    lines = ["| term | |", "|---|---|"]
    lines += [f"| {term} | {what} |" for term, what in (PRETRAININGS | CORPORA).items()]
    return "\n".join(lines)


def _table(rows: Iterable[BackboneSpec]) -> Iterator[str]:
    yield f"| {' | '.join(_COLUMNS)} |"
    yield f"|{'---|' * len(_COLUMNS)}"
    for spec in rows:
        cells = (
            f"`{spec.name}`",
            spec.family,
            spec.architecture,
            spec.pretraining,
            spec.corpus,
            _tokens(spec),
            _pixels(spec),
            spec.head.kind,
            f"`{spec.base}`" if spec.base else "",
            spec.licence,
        )
        yield f"| {' | '.join(cells)} |"


def _tokens(spec: BackboneSpec) -> str:
    """Of the default site, in the order they stand in: 1 cls + 4 registers + 16×16 patches."""
    site = spec.sites[spec.site]
    grid = "" if site.grid is None else f"{site.grid[0]}×{site.grid[1]}"
    parts = (
        f"{grid if kind in ('patches', 'grid') else part.stop - part.start} {kind}"
        for kind, part in site.kinds.items()
    )
    return " + ".join(parts)


def _pixels(spec: BackboneSpec) -> str:
    """How an image becomes pixels: 256 → 224 is shortest side 256, then the central 224."""
    pixels = spec.input
    to = pixels.resize_to or pixels.size
    if pixels.resize == "squash":
        return f"{to}, squashed"
    return f"{to} → {pixels.size}" if to != pixels.size else f"{to}"
