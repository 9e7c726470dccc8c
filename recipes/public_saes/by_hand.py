"""SAEs on share links, to be fetched by hand: PatchSAE, ConceptScope, UniversalSAE, and those of
Discover-then-Name. Their files go below the user's folder for weights (`saebench.paths`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from recipes.public_saes.entry import Entry


def entries() -> Iterator[Entry]:
    yield from _patch_saes()
    yield from _universal()
    yield from _discover_then_name()


_CODE_IS_MIT = {"licence": "that of its code is MIT"}


def _patch_saes() -> Iterator[Entry]:
    file = "clip-vit-base-patch16_-2_resid_49152.pt"
    patchsae = Entry(
        name="clip-vit-b16-openai/patchsae",
        series="clip-vit-b16-openai/patchsae",
        site="blocks.10",
        tokens="all",
        architecture="relu",
        s=49152,
        recipe="patchsae",
        trained_on="imagenet-1k/train",
        description="PatchSAE: ReLU, 49,152 latents, on all tokens of the second to last block",
        paper="https://arxiv.org/abs/2412.05276",
        weights={
            "file": f"patchsae/{file}",
            "url": "https://github.com/dynamical-inference/patchsae",
        },
        unknown=_CODE_IS_MIT,
        note="Its README links archives on Google Drive (data.zip, out.zip).",
    )
    yield patchsae
    yield replace(
        patchsae,
        name="clip-vit-l14-openai/conceptscope",
        series="clip-vit-l14-openai/conceptscope",
        site="blocks.22",
        s=32768,
        recipe="conceptscope",
        description="ConceptScope: ReLU, 32,768 latents, on the second to last block",
        paper="https://arxiv.org/abs/2510.26186",
        weights={
            "file": "conceptscope/clip-vit-large-patch14_-2_resid_32768.pt",
            "url": "https://github.com/jjho-choi/ConceptScope",
        },
        note="Its README links out.zip on Google Drive; the file is in\n"
        "out/checkpoints/openai_l14_32K_base.\n"
        "not known: tokens. By default its training script takes CLS and patches, at 336 pixels;\n"
        "the file's own configuration has a class_token.",
    )


def _universal() -> Iterator[Entry]:
    # As the registry calls it, as its makers do, model_mean and model_std of their yaml.
    models = (
        ("siglip-vit-b16", "SigLIP", -0.030537348240613937, 2.231515407562256),
        ("dinov2-vits14", "DinoV2", 0.03290482237935066, 2.474064350128174),
        ("vit-b16-augreg2-in21k-ft-in1k", "ViT", -0.028632672503590584, 2.1376500129699707),
    )
    squashed = "Its makers squash an image to 224 x 224"
    notes = {
        "SigLIP": "",
        "DinoV2": f"{squashed}, and resize the 16 x 16 patches to 14 x 14, bilinearly.",
        "ViT": f"{squashed}. Of timm they took vit_base_patch16_224 without a tag.",
    }
    for backbone, theirs, mean, std in models:
        yield Entry(
            name=f"{backbone}/universalsae",
            series="*/universalsae",
            site="norm",
            tokens="patches",
            architecture="topk",
            s=6144,
            recipe="universalsae",
            trained_on="imagenet-1k/train",
            l0=32.0,
            description="UniversalSAE: TopK at k = 32, 6,144 latents that three backbones share",
            paper="https://arxiv.org/abs/2502.03714",
            weights={
                "file": f"universalsae/uni_{theirs}_checkpoint_29.pth",
                "url": "https://drive.google.com/drive/folders/1zkh5Ftd2dRJFKEzYwad0AZKsn-A8MWNx",
            },
            semantics={"k": 32, "input_mean": mean, "input_std": std + 1e-5},
            unknown=_CODE_IS_MIT,
            note=notes[theirs],
        )


def _discover_then_name() -> Iterator[Entry]:
    models = {
        "clip-rn50-openai": "clip_RN50",
        "clip-vit-b16-openai": "clip_ViT-B16",
        "clip-vit-l14-openai": "clip_ViT-L14",
    }
    for backbone, theirs in models.items():
        yield Entry(
            name=f"{backbone}/discover-then-name",
            series="*/discover-then-name",
            site="embedding",
            tokens="pooled",
            architecture="relu",
            s=8192 if backbone == "clip-rn50-openai" else None,
            recipe="discover-then-name",
            trained_on="cc3m",
            description="Discover-then-Name: ReLU on the image embedding, not normalised",
            paper="https://arxiv.org/abs/2407.14499",
            weights={
                "file": f"discover-then-name/{theirs}/sparse_autoencoder_final.pt",
                "url": "https://nextcloud.mpi-klsb.mpg.de/index.php/s/PZYoKSq29XaEgL6",
            },
            unknown=_CODE_IS_MIT,
        )
