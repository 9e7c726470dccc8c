"""visaebench: five backbones, three widths, four sparsities, on the patches of the last block."""

from __future__ import annotations

from collections.abc import Iterator

from recipes.public_saes.entry import Entry, scaling

_BACKBONES = {  # as the registry calls it, as its makers do
    "clip-vit-b16-openai": "clip-vitb16",
    "dinov2-vitb14": "dinov2-vitb14",
    "siglip-vit-b16": "siglip-vitb16",
    "mae-vitb16": "mae-vitb16",
    "deit-b16": "deit-vitb16",
}
_PIXELS = "Pixels were those of the image processors of transformers."
_NORM = (
    "It was trained on the block's output, before the final norm; the package's own loader\n"
    "gives it activations after that norm."
)
_MEASURED = {("dinov2-vitb14", 16, 192): 208.0}


def entries() -> Iterator[Entry]:
    for backbone, theirs in _BACKBONES.items():
        for expansion in (8, 16, 32):
            for k in (64, 128, 192, 256):
                yield _one(backbone, theirs, expansion, k)


def _one(backbone: str, theirs: str, expansion: int, k: int) -> Entry:
    s = 768 * expansion
    measured = _MEASURED.get((backbone, expansion, k))
    return Entry(
        name=f"{backbone}/visaebench-{expansion}x-k{k}",
        series=f"{backbone}/visaebench-*",
        site="blocks.11",
        tokens="patches",
        architecture="batchtopk",
        s=s,
        recipe=f"visaebench-{expansion}x",
        trained_on="imagenet-1k/train, 100,000 images balanced over the classes",
        l0=measured or float(k),
        l0_note="as its makers measured it" if measured else "the k of training",
        description=f"visaebench: BatchTopK at k = {k}, {s:,} latents, on the patches",
        paper="https://openreview.net/forum?id=jdIiJipMI4",
        weights={
            "hub": f"visaebench/{theirs}-saes",
            "filename": f"batchtopk_{expansion}x_k{k}/",
        },
        asked=(
            scaling(
                "(x - mean[768]) / one number, of the train activations of its makers",
                "standardise",
            ),
        ),
        note=f"{_PIXELS}\n{_NORM}" if backbone.startswith("dinov2") else _PIXELS,
        unknown={
            "licence": "that of its package is Apache-2.0",
            "filename": "its loader takes sae.pt, else model.safetensors",
            "configuration": "its loader takes config.json, else config.yaml",
        },
    )
