"""Everything that decides one SAE, given the rows it is trained on: a frozen dataclass.

Two SAEs whose recipes differ only in `seed` were made in the same way, whatever their backbone:
`Recipe.title` is then the same text, and it is what the registry entry carries as its recipe.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

Arch = Literal["relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka-batchtopk"]
ARCHITECTURES: tuple[Arch, ...] = get_args(Arch)
PENALISED: tuple[Arch, ...] = ("relu", "jumprelu", "gated")
"""Reach their L0 through a penalty whose coefficient is steered; the others take k."""
THRESHOLDED: tuple[Arch, ...] = ("batchtopk", "matryoshka-batchtopk")
"""Choose over a batch in training and by one stored threshold afterwards."""

VERSION = 1  # of the training procedure; a change that moves its results counts it up
PREFIX_SHARES = (1 / 16, 3 / 16, 7 / 16, 1.0)  # nested prefixes of a Matryoshka SAE


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One SAE's architecture, sparsity and optimisation. `k` or `l0`, whichever fits `arch`."""

    arch: Arch
    k: int | None = None
    l0: float | None = None
    d_sae: int
    seed: int = 0
    steps: int
    batch_rows: int
    lr: float
    warmup: float = 0.05  # share of the steps in which lr rises linearly
    decay: float = 0.3  # share of the steps, the last ones, in which lr falls linearly to 0
    clip: float = 1.0  # largest norm of the gradient
    aux: float = 1 / 32  # weight of AuxK, by which dead latents of the TopK family are revived
    dead_after: int = 0  # rows without firing after which a latent counts as dead
    b_dec: Literal["mean", "geometric-median"] = "mean"
    penalty: Literal["step", "tanh"] = "step"  # of jumprelu
    bandwidth: float = 1.0  # of jumprelu's straight-through estimate, in units of 1/√d
    tanh_scale: float = 4.0  # c of the tanh penalty, in units of √d
    init: str = ""  # hash of the SAE it starts from

    @property
    def target(self) -> float:
        """The mean L0 that the SAE is to have."""
        value = self.l0 if self.k is None else self.k
        assert value is not None
        return float(value)

    @property
    def setting(self) -> str:
        """`topk-k16`, `jumprelu-l0-16`; further seeds than 0 add `-s1`."""
        sparsity = f"l0-{self.target:g}" if self.k is None else f"k{self.k}"
        return f"{self.arch}-{sparsity}" + (f"-s{self.seed}" if self.seed else "")

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Ends of the nested prefixes of a Matryoshka SAE; the last is d_sae."""
        return tuple(max(1, round(share * self.d_sae)) for share in PREFIX_SHARES)

    def plain(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @property
    def title(self) -> str:
        """One line that is the same for all SAEs made in the same way, seeds aside."""
        same = json.dumps({**self.plain(), "seed": 0}, sort_keys=True)
        digest = hashlib.sha256(same.encode()).hexdigest()[:8]
        setting = dataclasses.replace(self, seed=0).setting
        return (
            f"saebench train {VERSION}: {setting}, s = {self.d_sae}, "
            f"{self.steps} x {self.batch_rows} rows, lr {self.lr:.2g} [{digest}]"
        )
