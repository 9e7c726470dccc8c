"""The slow plain way to measure `loss_substitution`: forward hooks, one image at a time.

The models are loaded by timm and open_clip themselves, the SAEs computed by NumPy from their
weights, and the sums taken by Python. Nothing here uses `saebench.backbones`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from safetensors.torch import load_file

from saebench.data import open_dataset
from saebench.paths import CONTENT
from saebench.registry import Registry
from saebench.saes import Sae
from tests.small import random_sae

N, N_TRAIN = 24, 12
PASSES = ("clean", "spliced", "zero", "mean")
CLS, PATCHES, ALL = slice(0, 1), slice(1, 65), slice(0, 65)

SAES = {  # name -> backbone, site, tokens
    "whole": ("tiny-vit", "blocks.2", "all"),
    "cls": ("tiny-vit", "blocks.1", "cls"),
    "late": ("tiny-vit", "blocks.3", "patches"),
    "mlp": ("tiny-vit", "blocks.2.mlp", "all"),
    "map": ("tiny-resnet", "layer3", "all"),
    "clip": ("tiny-clip", "blocks.2", "patches"),
    "bioclip": ("tiny-bioclip", "blocks.1", "all"),
    "dino": ("tiny-dinov2", "blocks.1", "all"),
}


def sae_of(name: str) -> Sae:
    return random_sae(list(SAES).index(name), k=None, d=64)


@cache
def images(split: str, n: int) -> tuple[torch.Tensor, np.ndarray]:
    data = open_dataset(Registry.load().dataset("shapes"))
    rows = data.manifest(split).order(n)
    pixels = np.stack([np.asarray(data.image(split, int(i))) for i in rows])
    x_b3hw = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x_b3hw - 0.5) / 0.5, data.manifest(split).labels[rows]


@cache
def model_of(backbone: str) -> torch.nn.Module:
    spec = Registry.load().backbone(backbone)
    assert spec.weights.file
    weights = CONTENT / "registry/backbones" / spec.weights.file
    if "clip" in backbone:  # the two are of one architecture
        logging.disable(logging.WARNING)  # it warns that it loads no weights
        folder = CONTENT / "registry/weights/tiny-clip"
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        logging.disable(logging.NOTSET)
    else:
        model = timm.create_model(spec.model, pretrained=False, **spec.model_args)
    model.load_state_dict(load_file(weights))
    return model.float().eval()


@torch.inference_mode()
def output(backbone: str, site: str, image: torch.Tensor, replace: Callable | None) -> Any:
    """(embedding, logits) of one image, with what a site gives handed through `replace`."""
    model = model_of(backbone)
    is_clip = isinstance(model, open_clip.CLIP)
    path = site.replace("blocks", "visual.transformer.resblocks") if is_clip else site
    module = model.get_submodule(path)

    def hook(_module: Any, _inputs: Any, found: torch.Tensor) -> torch.Tensor | None:
        if replace is None:
            return None
        is_map = found.ndim == 4
        x_td = found[0].flatten(1).T if is_map else found[0]
        new_td = torch.from_numpy(replace(x_td.double().numpy())).float()
        return (new_td.T.reshape(found[0].shape) if is_map else new_td)[None]

    handle = module.register_forward_hook(hook)
    try:
        if is_clip:
            embedding = model.encode_image(image[None])
            return embedding[0].double().numpy(), None
        features = model.forward_features(image[None])  # type: ignore[operator]
        embedding = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        vector = embedding[0].double().numpy()
        if not model.num_classes:
            return vector, None
        logits = model.get_classifier()(embedding)  # type: ignore[operator]
        return vector, logits[0, 10:58].double().numpy()
    finally:
        handle.remove()


def train_mean(backbone: str, site: str, part: slice) -> np.ndarray:
    """[d] of the tokens of a kind."""
    seen: list[np.ndarray] = []
    for image in images("train", N_TRAIN)[0]:
        output(backbone, site, image, lambda x_td: seen.append(x_td[part]) or x_td)
    return np.concatenate(seen).mean(0)


def reconstruction(sae: Sae, x_td: np.ndarray) -> np.ndarray:
    W_dec, bias = sae.W_dec_sd.double().numpy(), sae.b_dec_d.double().numpy()
    return np.maximum((x_td - bias) @ W_dec.T + sae.b_enc_s.double().numpy(), 0) @ W_dec + bias


def slow(
    name: str, replaced: slice, ablated: slice, kinds: Mapping[str, slice], heads: Any = None
) -> dict[str, dict[str, float]]:
    """head -> metric -> value. `heads`: name -> embedding -> logits; none: the model's own."""
    backbone, site, _ = SAES[name]
    sae = sae_of(name)
    means = {kind: train_mean(backbone, site, part) for kind, part in kinds.items()}

    def swapped(x_td: np.ndarray, part: slice, new_td: np.ndarray) -> np.ndarray:
        changed_td = x_td.copy()
        changed_td[part] = new_td[part]
        return changed_td

    def mean_of(x_td: np.ndarray) -> np.ndarray:
        mean_td = np.empty_like(x_td)
        for kind, part in kinds.items():
            mean_td[part] = means[kind]
        return mean_td

    edits: dict[str, Callable | None] = {
        "clean": None,
        "spliced": lambda x: swapped(x, replaced, reconstruction(sae, x)),
        "zero": lambda x: swapped(x, ablated, np.zeros_like(x)),
        "mean": lambda x: swapped(x, ablated, mean_of(x)),
    }
    found: dict[str, dict[str, list]] = {}
    vectors: dict[str, list[np.ndarray]] = {key: [] for key in edits}
    for image, label in zip(*images("test", N), strict=True):
        outputs = {key: output(backbone, site, image, edit) for key, edit in edits.items()}
        for key, (embedding, _) in outputs.items():
            vectors[key].append(embedding)
        for head, read in (heads or {"": None}).items():
            lists = found.setdefault(head, {})
            logits = {k: read(e) if read else own for k, (e, own) in outputs.items()}
            p = np.exp(logits["clean"]) / np.exp(logits["clean"]).sum()
            for key, row in logits.items():
                log_q = row - math.log(np.exp(row).sum())
                kl = float((p * (np.log(p) - log_q)).sum())
                values = {
                    "loss": -log_q[label],
                    "accuracy": row.argmax() == label,
                    "accuracy_top5": label in np.argsort(-row, kind="stable")[:5],
                    "agreement": row.argmax() == logits["clean"].argmax(),
                    "kl": kl,
                }
                for metric, value in values.items():
                    lists.setdefault(f"{metric}_{key}", []).append(value)
    result = {
        head: {m: math.fsum(v) / len(v) for m, v in lists.items()} for head, lists in found.items()
    }
    for values in result.values():
        clean, spliced, zero, mean = (values[f"loss_{key}"] for key in PASSES)
        values |= {"loss_increase": spliced - clean}
        values |= {"loss_recovered": (zero - spliced) / (zero - clean)}
        values |= {"loss_recovered_mean": (mean - spliced) / (mean - clean)}
        del values["agreement_clean"], values["kl_clean"]
    e = np.stack(vectors["clean"])
    for key in PASSES[1:]:
        other = np.stack(vectors[key])
        lengths = np.linalg.norm(e, axis=1) * np.linalg.norm(other, axis=1)
        result[""][f"embedding_cosine_{key}"] = float(((e * other).sum(1) / lengths).mean())
        spread = ((e - e.mean(0)) ** 2).sum()
        result[""][f"embedding_nmse_{key}"] = float(((other - e) ** 2).sum() / spread)
    return result


def clip_heads(backbone: str) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Variant -> logits, by the entry's templates and bare names, at two temperatures."""
    registry, model = Registry.load(), model_of(backbone)
    assert isinstance(model, open_clip.CLIP)
    folder = CONTENT / "registry/weights/tiny-clip"
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    merges = folder / config["text_cfg"]["tokenizer_kwargs"]["bpe_path"]
    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=str(merges))
    templates = registry.backbone(backbone).head.templates["shapes"]
    names = open_dataset(registry.dataset("shapes")).class_names
    scale = model.logit_scale.exp().item()
    heads = {}
    for texts, sentences in {"": templates, "texts=names": ("{}",)}.items():
        classes = []
        for name in names:
            with torch.inference_mode():
                tokens = tokenizer([s.format(name) for s in sentences])
                text = model.encode_text(tokens, normalize=True).double().mean(0).numpy()
            classes.append(text / np.linalg.norm(text))
        W = np.stack(classes)
        for temperature, factor in {"": scale, "temperature=1": 1.0}.items():

            def logits(e: np.ndarray, W: np.ndarray = W, factor: float = factor) -> np.ndarray:
                return factor * (W @ (e / np.linalg.norm(e)))

            heads[";".join(filter(None, [temperature, texts]))] = logits
    return heads
