"""SAEs on CLIP and SigLIP that are on the hub: CLIP-Scope, sae-for-vlm, MSAE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from recipes.public_saes.entry import Entry, scaling


def entries() -> Iterator[Entry]:
    yield from _clip_scope()
    yield from _sae_for_vlm()
    yield from _msae()


def _clip_scope() -> Iterator[Entry]:
    seen = (2, 8, 11, 20, 22)
    variance = {2: 763, 5: 665, 8: 642, 11: 674, 14: 689, 17: 731, 20: 706, 22: 684}
    for layer, thousandths in variance.items():
        yield Entry(
            name=f"clip-vit-l14-laion2b/clipscope-layer{layer}",
            series="clip-vit-l14-laion2b/clipscope-layer*",
            site=f"blocks.{layer}",
            tokens="all",
            architecture="topk",
            s=65536,
            recipe="clipscope",
            trained_on="laion-2b, its multilingual part with captions in English",
            l0=32.0,
            description="CLIP-Scope: TopK at k = 32, signed, 65,536 latents, 1.2 billion tokens; "
            f"by its makers explained variance .{thousandths} of z-scored activations",
            licence="CC-BY-4.0",
            paper="https://huggingface.co/lewington/CLIP-ViT-L-scope",
            weights={
                "hub": "lewington/CLIP-ViT-L-scope",
                "filename": f"{layer}_resid/" + ("1200013184.pt" if layer in seen else ""),
            },
            asked=(
                scaling(
                    "each batch of 32,896 tokens was z-scored with its own mean and deviation",
                    "zscore",
                ),
            ),
            note="not known: which mean and std its pixels had; open_clip has .5 for these\n"
            "weights, CLIP's processor in transformers its own.",
            unknown={} if layer in seen else {"filename": "1200013184.pt in other layers"},
        )


def _sae_for_vlm() -> Iterator[Entry]:
    embedding = ("embedding", "pooled", "embedding")
    clip = "clip-vit-l14-336-openai"
    places = [(clip, f"blocks.{layer}", "cls", f"layer{layer}") for layer in (11, 17, 22, 23)]
    places += [(clip, *embedding), ("siglip-so400m-patch14-384", *embedding)]
    for architecture in ("batchtopk", "matryoshka-batchtopk"):
        for backbone, site, tokens, where in places:
            yield Entry(
                name=f"{backbone}/sae-for-vlm-{architecture}-{where}",
                series=f"{backbone}/sae-for-vlm-{architecture}-*",
                site=site,
                tokens=tokens,
                architecture=architecture,
                s=None,
                recipe=f"sae-for-vlm-{architecture}",
                trained_on="imagenet-1k/train",
                l0=20.0,
                l0_note="the k of training",
                description=f"sae-for-vlm: {_TITLES[architecture]} at k = 20, on {_ON[tokens]}; by "
                "its makers 1 to 64 latents a dimension",
                paper="https://arxiv.org/abs/2504.02821",
                weights={"hub": "mateuszpach/sae-for-vlm"},
                unknown={
                    "licence": "the repository was not looked up",
                    "filename": "nor which widths it has",
                },
            )


_TITLES = {"batchtopk": "BatchTopK", "matryoshka-batchtopk": "Matryoshka BatchTopK"}
_ON = {"cls": "CLS", "pooled": "the image embedding"}


def _msae() -> Iterator[Entry]:
    b16 = Entry(
        name="clip-vit-b16-openai/msae",
        series="clip-vit-b16-openai/msae",
        site="embedding",
        tokens="pooled",
        architecture="matryoshka-topk",
        s=None,
        recipe="msae",
        description="MSAE: Matryoshka TopK on the image embedding",
        paper="https://arxiv.org/abs/2502.20578",
        weights={"hub": "WolodjaZ/MSAE"},
        unknown={
            "trained_on": "the file's name ends with it",
            "licence": "that of its code is MIT",
            "filename": "the name says latents, activation, normalisation and soft cap",
        },
    )
    yield b16
    yield replace(b16, name="clip-vit-l14-openai/msae", series="clip-vit-l14-openai/msae")
