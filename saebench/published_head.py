"""Reads a published linear head: its file found, checked, and compared with what it is to read.

    DINOv2's                weight [c, k·d], bias [c]; inputs side by side: CLS, mean of patches
    DINO's eval_linear.py   state_dict: module.linear.weight, module.linear.bias, beside what its
                            optimiser was at; inputs alternate (`interleaved`), since the script
                            stacks CLS and the mean of patches along a last axis of their own
    any other               weight and bias under one name, and nothing else

safetensors, or what torch.save wrote; read as data, without running code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saebench.backbones import Backbone
from saebench.backbones.checkpoint import check_finite, read_tensors
from saebench.data import Dataset
from saebench.errors import SpecError, WeightsError
from saebench.weights import HeadFile, table, verified_path


def read_published(backbone: Backbone, dataset: Dataset, file: HeadFile) -> tuple[Tensor, Tensor]:
    """W_dc [d c] and b_c [c], float64 on the CPU, d what a linear head reads of the backbone.

    Errors: WeightsError (not there, altered, no linear layer, or of other classes or features),
    SpecError (the entry names no file).
    """
    path = verified_path(file)
    if path is None:
        raise SpecError(
            f"{file.path or file.name}: [{table(file)}] names no file",
            'file = "…" beside the entry, or hub = "owner/name" and filename = "…"',
        )
    weight_cd, bias_c = _layer(path)
    features = backbone.spec.head.features
    if backbone.spec.head.interleaved:
        k = len(features)
        weight_cd = weight_cd.unflatten(1, (-1, k)).transpose(1, 2).flatten(1)
    c, d = weight_cd.shape
    width, n_classes = read_width(backbone), len(dataset.class_names)
    if (c, d) != (n_classes, width):
        raise WeightsError(
            f"{path} is a linear head from {d:,} features to {c:,} classes; the backbone "
            f"'{file.name}' gives {width:,} ({', '.join(features)}), and the dataset "
            f"'{dataset.spec.name}' has {n_classes:,} classes",
            f"correct  features  or [{table(file)}] in {file.path or file.name}; without that "
            "table a probe is fitted",
        )
    return weight_cd.T.contiguous(), bias_c


def read_width(backbone: Backbone) -> int:
    """d, the number of features that a linear head reads of a backbone."""
    size = backbone.spec.input.size
    return backbone.forward(torch.zeros(1, 3, size, size)).read_bd.shape[1]


def _layer(path: Path) -> tuple[Tensor, Tensor]:
    """weight [c d] and bias [c] of a file that holds one linear layer. Errors: WeightsError."""
    tensors = read_tensors(path)
    names = {name.rpartition(".")[2]: name for name in tensors}
    prefixes = {name.rpartition(".")[0] for name in tensors}
    shapes = [tensors[names[key]].shape for key in ("weight", "bias") if key in names]
    whole = len(tensors) == 2 and len(shapes) == 2 and len(prefixes) == 1
    if not whole or len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
        shown = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise WeightsError(
            f"{path} is no linear layer: it holds {shown[:200] or 'no tensors'}",
            "one layer's weight [classes, features] and bias [classes], and nothing else, are read",
        )
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise WeightsError(f"{path} holds no floats", "quantised weights are not read: save floats")
    check_finite(tensors, path)
    return tensors[names["weight"]].double(), tensors[names["bias"]].double()
