"""saev (OSU NLP Group): three SAEs of February 2025, and families on DINOv3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from recipes.public_saes.entry import Entry, scaling

_FIRST = "https://arxiv.org/abs/2502.06755"
_SECOND = "https://arxiv.org/abs/2511.17735"
_LOGBOOK = "of their logbook, on scaled x; not known for certain to be this file's"
_SCALED = "its makers' example gives it raw x, and training of that time scaled x by default"


def entries() -> Iterator[Entry]:
    yield from _first()
    yield from _dinov3()


def _first() -> Iterator[Entry]:
    clip = Entry(
        name="clip-vit-b16-openai/saev",
        series="clip-vit-b16-openai/saev",
        site="blocks.10",
        tokens="patches",
        architecture="relu",
        s=24576,
        recipe="saev",
        trained_on="imagenet-1k/train",
        l0=412.7,
        l0_note=_LOGBOOK,
        description="saev: ReLU, 24,576 latents, on the patches of the second to last block",
        licence="MIT",
        paper=_FIRST,
        weights={"hub": "osunlp/SAE_CLIP_24K_ViT-B-16_IN1K", "filename": "sae.pt"},
        asked=(scaling(_SCALED, "mean_norm"),),
    )
    yield clip
    yield replace(
        clip,
        name="bioclip/saev",
        series="bioclip/saev",
        trained_on="inat21",
        l0=None,
        weights={"hub": "osunlp/SAE_BioCLIP_24K_ViT-B-16_iNat21", "filename": "sae.pt"},
    )
    yield replace(
        clip,
        name="dinov2-vitb14-reg/saev",
        series="dinov2-vitb14-reg/saev",
        l0=728.7,
        weights={"hub": "osunlp/SAE_DINOv2_24K_ViT-B-14_IN1K", "filename": "sae.pt"},
        asked=(
            scaling(
                "its makers' example takes (x - mean) / 2.0181241035461426, with a mean of 768 "
                "numbers that it lists",
                "mean_norm",
            ),
        ),
        note="Its makers squash an image to 256 x 256 before the crop of 224; the backbone's own\n"
        "pipeline keeps the aspect.",
    )


_MATRYOSHKA = {
    "dinov3-vits16": ("ViT-S", range(6, 12)),
    "dinov3-vitb16": ("ViT-B", range(6, 12)),
    "dinov3-vitl16": ("ViT-L", range(13, 24, 2)),
}
_GRID = (
    "Its makers resize an image to a grid of whole patches that keeps its aspect; the backbone's\n"
    "own pipeline crops a square."
)
_RUNS = "<run>/sae.pt, several that differ in L0; manifest.jsonl lists them"


def _dinov3() -> Iterator[Entry]:
    for backbone, (model, layers) in _MATRYOSHKA.items():
        family = Entry(
            name=f"{backbone}/saev-matryoshka",
            series=f"{backbone}/saev-matryoshka-layer*",
            site="",
            tokens="patches",
            architecture="matryoshka-relu",
            s=16384,
            recipe="saev-matryoshka",
            trained_on="imagenet-1k/train",
            description="saev: Matryoshka ReLU, 16,384 latents, on the patches",
            licence="MIT",
            paper=_SECOND,
            weights={"hub": f"osunlp/SAE_DINOv3_{model}-16_IN1K"},
            note=_GRID,
        )
        for layer in layers:
            yield _at(family, layer)
        if backbone == "dinov3-vitl16":
            named = replace(
                _at(family, 23),
                name=f"{backbone}/saev-matryoshka-lnleoyf6",
                series=f"{backbone}/saev-matryoshka-lnleoyf6",
                description=f"{family.description}; the run that its makers' page takes",
                suite="default",
                unknown={},
            )
            yield replace(named, weights={**family.weights, "filename": "layer_23/lnleoyf6/sae.pt"})
            topk = replace(
                family,
                name=f"{backbone}/saev-topk",
                series=f"{backbone}/saev-topk-layer*",
                architecture="topk",
                recipe="saev-topk",
                description="saev: TopK at k = 16, 64 or 256, 16,384 latents, on the patches",
                weights={"hub": "osunlp/SAE_DINOv3_TopK_ViT-L-16_IN1K"},
            )
            for layer in layers:
                yield _at(topk, layer)


def _at(family: Entry, layer: int) -> Entry:
    return replace(
        family,
        name=f"{family.name}-layer{layer}",
        site=f"blocks.{layer}",
        weights={**family.weights, "filename": f"layer_{layer}/"},
        unknown={"filename": _RUNS},
    )
