"""A small real setting for tests of a whole run: a seeded backbone, SAEs on it, real images.

Everything is written as a user would have it: TOML entries and safetensors in a content folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file

from saebench.activations import Threshold, TopK
from saebench.formats import write_sae
from saebench.saes import Sae
from tests.content import BACKBONE, TASK, sae_entry, write

WIDTH, TOKENS, LATENTS = 16, 17, 48
SIZES = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": WIDTH,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 0,
}

DATASETS = {
    # 4,096 images: two segments
    "registry/datasets/long.toml": 'source = "shapes"\ntrain = "val"\ntest = "train"\n',
}


def save_backbone(path: Path, seed: int = 0) -> None:
    """A small ViT with seeded random weights, larger than timm's own so that tokens differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", **SIZES)
        state = {
            name: tensor * 4 if tensor.ndim > 1 else tensor + 0.1
            for name, tensor in model.state_dict().items()
        }
    save_file(state, path)


def random_sae(seed: int = 0, *, k: int | None = 4, d: int = WIDTH, s: int = LATENTS) -> Sae:
    """A tied SAE of random unit directions: TopK, or ReLU with k None."""
    generator = torch.Generator().manual_seed(seed)
    W_dec_sd = torch.nn.functional.normalize(torch.randn(s, d, generator=generator), dim=1)
    b_dec_d = torch.randn(d, generator=generator) * 0.1
    return Sae(
        W_enc_ds=W_dec_sd.T.contiguous(),
        b_enc_s=torch.full((s,), -0.5 if k is None else 0.0),
        W_dec_sd=W_dec_sd,
        b_dec_d=b_dec_d,
        activation=Threshold() if k is None else TopK(k),
        architecture="relu" if k is None else "topk",
        b_pre_d=b_dec_d,
    )


def setting(root: Path) -> Path:
    """A content folder with the backbone `small` and the SAEs small/{a,b,relu,cls,meta}."""
    write(
        root,
        {
            "registry/backbones/small.toml": BACKBONE + '[weights]\nfile = "small.safetensors"\n',
            "tasks/rows.py": TASK,
            **DATASETS,
        },
    )
    save_backbone(root / "registry/backbones/small.safetensors")
    add_sae(root, "a", random_sae(0), l0=4.0)
    add_sae(root, "b", random_sae(1, k=8), l0=8.0)
    add_sae(root, "relu", random_sae(2, k=None))
    add_sae(root, "cls", random_sae(3), tokens="cls")
    add_sae(root, "meta", random_sae(4, d=LATENTS), site="sae:small/a/codes")
    return root


def add_sae(root: Path, name: str, sae: Sae, **entry: object) -> Path:
    """Write an SAE's file and its entry; returns the file."""
    folder = root / "registry/saes/small"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    write_sae(sae, path)
    text = sae_entry(**entry).replace("sae.safetensors", path.name)  # type: ignore[arg-type]
    (folder / f"{name}.toml").write_text(text)
    return path


def activations(root: Path, dataset: str, split: str, n: int) -> np.ndarray:
    """[n t d] float32 of the small backbone at its site, by a plain forward hook of timm."""
    from safetensors.torch import load_file

    from saebench.data import open_dataset
    from saebench.registry import Registry

    registry = Registry.load([root])
    model = timm.create_model("vit_tiny_patch16_224", **SIZES).eval()
    model.load_state_dict(load_file(root / "registry/backbones/small.safetensors"))
    data = open_dataset(registry.dataset(dataset))
    order = data.manifest(split).order(n)
    pixels = np.stack([np.asarray(data.image(split, int(i)).convert("RGB")) for i in order])
    images_b3hw = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    images_b3hw = (images_b3hw - 0.5) / 0.5
    seen: list[torch.Tensor] = []
    model.blocks[1].register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.inference_mode():
        for chunk in images_b3hw.split(64):
            model(chunk)
    return torch.cat(seen).numpy()
