"""The probes of one unit, as its task finds them in `Context.probes`.

All were fitted on train images (`saebench.probing.fits`), and read raw features: the scaling that
they were fitted with is folded into W and b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from saebench.codes import Codes
from saebench.probe.single import SingleLatents
from saebench.probe.tree import Tree
from saebench.probe_features import Feature, Pooling
from saebench.saes import weighted_rows


@dataclass(frozen=True, eq=False)
class Fitted:
    """A linear classifier: logits = features @ W_dc + b_c, float64.

    Of a probe that the store has, W_dc lies in its file, and the rows that are used are read.
    latents_k: [k] int64, the columns of codes that it reads, in the order of the rows of W_dc;
    None: all. columns: what every row of it states (solver, penalty, converged, n_train); variant:
    what tells it from the default (`latents` where a dictionary was too large). note: a caution.
    """

    W_dc: Tensor
    b_c: Tensor
    latents_k: Tensor | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    variant: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def logits(self, features: Tensor | Codes) -> Tensor:
        """[b c] float64 of features [b d], or of the codes of b images."""
        if isinstance(features, Tensor):
            return features.double() @ self.W_dc + self.b_c
        codes = features if self.latents_k is None else only(features, self.latents_k)
        W_dc = self.W_dc
        if W_dc.device != self.b_c.device:  # a GPU that had no room for it
            codes, W_dc = fetched(codes, W_dc)
        exact = Codes(codes.d_sae, codes.offsets_n1, codes.indices_m, codes.values_m.double())
        return weighted_rows(exact, W_dc) + self.b_c


def fetched(codes: Codes, W_sc: Tensor) -> tuple[Codes, Tensor]:
    """The codes of the latents that any image has, and their rows of W, where the codes are."""
    latents_k = codes.indices_m.unique()
    return only(codes, latents_k), W_sc[latents_k.to(W_sc.device)].to(codes.values_m.device)


def only(codes: Codes, latents_k: Tensor) -> Codes:
    """The codes of some latents alone, numbered as they are listed."""
    place_s = latents_k.new_full((codes.d_sae,), -1)
    place_s[latents_k] = torch.arange(len(latents_k), device=place_s.device)
    place_m = place_s[codes.indices_m]
    kept_m = place_m >= 0
    before_m1 = pad(kept_m.cumsum(0), (1, 0))
    return Codes(
        len(latents_k), before_m1[codes.offsets_n1], place_m[kept_m], codes.values_m[kept_m]
    )


@dataclass(frozen=True, eq=False)
class Probes:
    """feature, label level ('' is the main label) and c classes are the same for all.

    x: on clean features; the frozen probe is this one. xhat: refitted on reconstructions. codes: by
    pooling, the default first. sparse: by k; tree and single: all three of the default pooling.
    missing: `xhat` or `codes` -> why there are none. taxonomy: level -> [c] int64, its value for
    each class, of the levels that the class decides (species: genus, family). looked: `tree` or
    `single` -> images that it was fitted on, where they may be fewer than those of the others.
    """

    feature: Feature
    label: str
    n_classes: int
    x: Fitted
    xhat: Fitted | None = None
    codes: Mapping[Pooling, Fitted] = field(default_factory=dict)
    sparse: Mapping[int, Fitted] = field(default_factory=dict)
    tree: Tree | None = None
    single: SingleLatents | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)  # that every row of the unit states
    variant: Mapping[str, Any] = field(default_factory=dict)  # label, shots, … where not default
    taxonomy: Mapping[str, np.ndarray] = field(default_factory=dict)
    looked: Mapping[str, int] = field(default_factory=dict)
