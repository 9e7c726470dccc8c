"""Supervised training with one joint head: the ten digits, then the species of `shapes`.

Cross-entropy over all outputs with label smoothing. Which outputs belong to which dataset is read
from the entry's `head.classes`.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import nn

from recipes.backbones.images import Augmentation, training_set
from recipes.backbones.optimise import Schedule, optimise
from saebench.specs import BackboneSpec

SMOOTHING = 0.1


def build(spec: BackboneSpec) -> nn.Module:
    """The entry's architecture with fresh weights (from torch's global generator)."""
    return timm.create_model(spec.model, pretrained=False, **spec.model_args)


def train(spec: BackboneSpec, schedule: Schedule, generator: torch.Generator) -> nn.Module:
    """A model trained from fresh weights."""
    data = training_set()
    first_digit, first_species = (spec.head.classes[name][0] for name in ("digits", "shapes"))
    targets_n = data.labels_n + torch.where(data.shapes_n, first_species, first_digit)
    model, augment = build(spec), Augmentation()

    def loss(rows_b: torch.Tensor, progress: float) -> torch.Tensor:
        images = augment(data.images_n3hw[rows_b], data.shapes_n[rows_b], generator)
        return F.cross_entropy(model(images), targets_n[rows_b], label_smoothing=SMOOTHING)

    return optimise(model, len(data), loss, schedule, generator)
