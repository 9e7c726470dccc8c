"""Whether a tensor is finite, in one pass over it and without a mask of its size."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # A sum is non-finite if any term is. It may overflow for finite terms, so only then is every
    # element looked at.
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
