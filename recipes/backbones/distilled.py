"""Self-distillation without labels (DINO, Caron et al., 2021; DINOv2, Oquab et al., 2024).

Two views are made of every image. A student sees both with half of their patches left out, a
teacher, whose weights are the moving average of the student's, sees them whole. Both end in a small
projection onto prototypes. From its part of one view the student is trained to tell the teacher's
assignment of the other: cross-entropy, the teacher's assignments balanced over the batch by
Sinkhorn-Knopp iterations (which prevent collapse), and the KoLeo term, which spreads the CLS
features. Masked views take the place of DINO's local crops (as in MSN, Assran et al., 2022): on
8x8 patches they cost less. The stored model is the teacher.

The teacher has only its first weights to start from, so these matter: with timm's default, queries
and positions are so small that CLS is little more than an average of patches (a probe on it tells
73 % of the digits), and a thousand steps change nothing. Xavier weights and positions of standard
deviation 0.5 give a first teacher that sees where things are (93 %).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from recipes.backbones.images import Augmentation, training_set
from recipes.backbones.optimise import Schedule, optimise
from saebench.specs import BackboneSpec

VIEW = Augmentation(
    zoom=(0.85, 1.1),
    shift=0.08,
    digit_turn=8 / 360,
    shape_turn=0.25,
    light=0.2,
    contrast=0.2,
    noise=0.1,
)
MIX = ("digits", "digits", "digits", "shapes")  # so that both domains are seen equally often
POSITION = 0.5  # standard deviation of the first position embeddings


@dataclass(frozen=True)
class Distillation:
    """Of the objective. Temperatures are divisors of cosines with the prototypes."""

    prototypes: int = 256
    hidden: int = 256
    student_temperature: float = 0.1
    teacher_temperature: float = 0.05
    momentum: float = 0.99  # of the teacher at the start; rises to 1
    koleo: float = 0.1
    drop: float = 0.5  # fraction of patches the student does not see


class Projected(nn.Module):
    """A backbone and its projection: images -> (CLS features [b d], cosines [b prototypes])."""

    def __init__(self, backbone: nn.Module, width: int, options: Distillation) -> None:
        super().__init__()
        self.backbone = backbone
        self.hidden = nn.Sequential(
            nn.Linear(width, options.hidden, bias=False),
            nn.BatchNorm1d(options.hidden),
            nn.GELU(),
            nn.Linear(options.hidden, width, bias=False),
            nn.BatchNorm1d(width, affine=False),
        )
        self.prototypes = nn.Parameter(torch.randn(options.prototypes, width))

    def forward(self, images_b3hw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cls_bd = self.backbone(images_b3hw)
        projected = F.normalize(self.hidden(cls_bd), dim=-1)
        return cls_bd, projected @ F.normalize(self.prototypes, dim=-1).T


def build(spec: BackboneSpec, **more: Any) -> Any:
    """The entry's architecture with fresh weights (from torch's global generator)."""
    return timm.create_model(spec.model, pretrained=False, **{**spec.model_args, **more})


def train(
    spec: BackboneSpec,
    schedule: Schedule,
    generator: torch.Generator,
    options: Distillation = Distillation(),
) -> nn.Module:
    """The teacher's backbone, trained from fresh weights."""
    data = training_set(MIX)
    backbone = build(spec, patch_drop_rate=options.drop, weight_init="jax")
    nn.init.normal_(backbone.pos_embed, std=POSITION)
    student = Projected(backbone, spec.sites[spec.site].width, options)
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.backbone.eval()

    def loss(rows_b: torch.Tensor, progress: float) -> torch.Tensor:
        images, shapes = data.images_n3hw[rows_b], data.shapes_n[rows_b]
        views = torch.cat([VIEW(images, shapes, generator) for _ in range(2)])
        with torch.no_grad():
            target_np = balanced(teacher(views)[1] / options.teacher_temperature)
        cls_nd, cosine_np = student(views)
        first, second = F.log_softmax(cosine_np / options.student_temperature, dim=-1).chunk(2)
        crossed = torch.cat([second, first])
        spread = sum(koleo(half) for half in cls_nd.chunk(2)) / 2
        return -(target_np * crossed).sum(-1).mean() + options.koleo * spread

    @torch.no_grad()
    def follow(progress: float) -> None:
        keep = 1 - (1 - options.momentum) * (1 + math.cos(math.pi * progress)) / 2
        for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            ours.lerp_(theirs, 1 - keep)

    optimise(student, len(data), loss, schedule, generator, after=follow)
    return teacher.backbone.eval()


def balanced(logits_bp: torch.Tensor, rounds: int = 3) -> torch.Tensor:
    """Sinkhorn-Knopp: rows that sum to 1, columns that sum to b / p (Caron et al., 2020)."""
    scores = (logits_bp - logits_bp.max()).exp()
    for _ in range(rounds):
        scores = scores / scores.sum(0, keepdim=True)
        scores = scores / scores.sum(1, keepdim=True)
    return scores


def koleo(features_bd: torch.Tensor) -> torch.Tensor:
    """Minus the mean log distance to the nearest other unit vector (Sablayrolles et al., 2019)."""
    unit = F.normalize(features_bd, dim=-1)
    with torch.no_grad():
        nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
    return -(unit - unit[nearest]).norm(dim=-1).add(1e-6).log().mean()
