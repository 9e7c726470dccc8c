"""Keeps float32 products float32: no TF32 in the matrix products and convolutions of a GPU.

TF32 rounds the factors to 10 bits of mantissa; PyTorch allows it in convolutions by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def ieee_float32(device: torch.device) -> Iterator[None]:
    """Within this context, TF32 is off. The flags are the process's, so they are put back."""
    if device.type != "cuda":
        yield
        return
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    saved = [_tf32_off(backend) for backend in backends]
    try:
        yield
    finally:
        for owner, name, value in reversed(saved):
            setattr(owner, name, value)


def _tf32_off(backend: Any) -> tuple[Any, str, Any]:
    """Turn TF32 off; returns what to put back, as (object, attribute, value)."""
    try:
        saved = (backend, "allow_tf32", backend.allow_tf32)
        backend.allow_tf32 = False
    except RuntimeError:  # set through the newer `fp32_precision`, and then the older flag refuses
        owner = getattr(backend, "conv", backend)
        saved = (owner, "fp32_precision", owner.fp32_precision)
        owner.fp32_precision = "ieee"
    return saved
