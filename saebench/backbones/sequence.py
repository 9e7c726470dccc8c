"""What a linear head reads of the final, normed sequence of tokens [b t d], side by side:

    cls       the CLS token
    patches   the mean of the patches: registers and the distillation token are in neither

The sequence lies at one boundary (`SteppedModel.sequence`). A site that lies after it cannot change
what is read there, so that is kept beside the activations of such a site. As in the linear
evaluation of DINOv2 (`dinov2.eval.linear`, `create_linear_input`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saebench.backbones.places import Depth
from saebench.backbones.steps import SteppedModel
from saebench.errors import Mismatch
from saebench.specs import BackboneSpec


class Features:
    """The features of an entry's linear head, of its model; nothing where they are the embedding.

    whole: whether they take more of the sequence than its CLS token.
    """

    def __init__(self, spec: BackboneSpec, model: SteppedModel) -> None:
        features = spec.head.features
        self._features = () if features == ("embedding",) else features
        self._model, self._who = model, spec.name
        self.whole = "patches" in self._features

    def at(self, boundary: int, x: Tensor, found_bd: Tensor | None) -> Tensor | None:
        """[b f·d] at the boundary of the sequence, and elsewhere what was found before.

        Errors: Mismatch where no such tokens lie there.
        """
        if not self._features or boundary != self._model.sequence:
            return found_bd
        n_prefix, grid = sum(self._model.prefix.values()), self._model.grid
        n_patches = None if grid is None else math.prod(grid)
        if x.ndim != 3 or (self.whole and x.shape[1] - n_prefix != n_patches):
            raise Mismatch(
                f"the final sequence of '{self._who}' is {list(x.shape)}, and not [b, "
                f"{n_prefix} + {n_patches or 0}, d]",
                "correct sequence, prefix and grid in its SteppedModel",
            )
        parts = [
            x[:, 0] if feature == "cls" else x[:, n_prefix:].mean(dim=1)
            for feature in self._features
        ]
        return torch.cat(parts, dim=1)

    def before(self, depth: Depth) -> bool:
        """Whether there are any, and they are read before the pass comes to a site."""
        sequence = self._model.sequence
        return bool(self._features) and sequence is not None and depth > (sequence, False, 0)
