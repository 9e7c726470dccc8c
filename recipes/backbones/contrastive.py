"""Contrastive training of an image and a text tower (CLIP, Radford et al., 2021).

With image embeddings I, text embeddings T (unit rows) and scale s, the logits are s I Tᵀ. CLIP
takes the other pairs of a batch as negatives; here a caption is often true of several images, and
which is known. So the targets of a row are uniform over all the true captions in the batch, those
of a column over all the images it is true of, and the loss is the mean of both cross-entropies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

from recipes.backbones.captions import Captions, coarse, taxonomic
from recipes.backbones.images import Augmentation, training_set
from recipes.backbones.optimise import Schedule, optimise
from saebench.specs import BackboneSpec

MAX_SCALE = math.log(100)


def folder(spec: BackboneSpec) -> Path:
    """Where the entry's open_clip configuration and merges are."""
    return (Path(spec.path).parent / spec.model.removeprefix("local-dir:")).resolve()


def build(spec: BackboneSpec) -> nn.Module:
    """The entry's architecture with fresh weights (from torch's global generator)."""
    return open_clip.create_model(f"local-dir:{folder(spec)}", load_weights=False)


def tokenizer(spec: BackboneSpec) -> Callable[[list[str]], torch.Tensor]:
    """texts -> [u context] token numbers; the merges file is named in the configuration."""
    where = folder(spec)
    config: dict[str, Any] = open_clip.get_model_config(f"local-dir:{where}") or {}
    merges = where / config["text_cfg"]["tokenizer_kwargs"]["bpe_path"]
    return open_clip.get_tokenizer(f"local-dir:{where}", bpe_path=str(merges))


def train(spec: BackboneSpec, schedule: Schedule, generator: torch.Generator) -> nn.Module:
    """tiny-clip: digits and the attributes of shapes, from fresh weights."""
    captions = coarse(spec.head.templates["digits"], spec.head.templates["shapes"])
    return _contrast(build(spec), spec, captions, ("digits", "shapes"), schedule, generator)


def fine_tune(
    spec: BackboneSpec, base: nn.Module, schedule: Schedule, generator: torch.Generator
) -> nn.Module:
    """tiny-bioclip: the species of shapes, from the weights of its base."""
    captions = taxonomic(spec.head.templates["shapes"])
    return _contrast(base, spec, captions, ("shapes",), schedule, generator)


def _contrast(
    model: Any,
    spec: BackboneSpec,
    captions: Captions,
    names: tuple[str, ...],
    schedule: Schedule,
    generator: torch.Generator,
) -> nn.Module:
    data, augment = training_set(names), Augmentation()
    classes_n = data.labels_n + 10 * data.shapes_n
    tokens_ul = tokenizer(spec)(list(captions.texts))

    def loss(rows_b: torch.Tensor, progress: float) -> torch.Tensor:
        classes_b = classes_n[rows_b]
        drawn_u = captions.draw(classes_b, generator).unique()
        images = augment(data.images_n3hw[rows_b], data.shapes_n[rows_b], generator)
        image_bd = model.encode_image(images, normalize=True)
        text_ud = model.encode_text(tokens_ul[drawn_u], normalize=True)
        logits_bu = model.logit_scale.clamp(max=MAX_SCALE).exp() * image_bd @ text_ud.T
        true_bu = captions.true_cu[classes_b][:, drawn_u].float()
        rows = F.cross_entropy(logits_bu, true_bu / true_bu.sum(1, keepdim=True))
        columns = F.cross_entropy(logits_bu.T, (true_bu / true_bu.sum(0)).T)
        return (rows + columns) / 2

    trained: Any = optimise(model, len(data), loss, schedule, generator)
    with torch.no_grad():  # readers use the stored scale as it is
        trained.logit_scale.clamp_(max=MAX_SCALE)
    return trained
