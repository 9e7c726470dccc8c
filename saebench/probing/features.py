"""What of an image a probe reads: a few tokens at a site made into one vector, or the embedding.

    cls        the CLS token                                       [d]
    mean       the mean of the image's own tokens, patches or grid [d]
    cls+mean   one after the other                                 [2d]
    pooled     a site that is one vector already                   [d]
    embedding  the backbone's final embedding, after the splice    [e]

of the tokens that an SAE covers. Codes are those of the same tokens: of one token as they are, of
several the maximum or the mean of each latent (`pooling`), and for `cls+mean` one after the other.
With `embedding` they are those of the default feature. An image's train and test features are made
by the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saebench.codes import Codes
from saebench.errors import UsageError
from saebench.task import Batch

FEATURES = ("auto", "cls", "mean", "cls+mean", "embedding")  # values of a task's option `feature`
SPATIAL = ("patches", "grid")

Pooling = Literal["max", "mean", "none"]  # none: there is one token


@dataclass(frozen=True)
class Feature:
    """A feature of one coder's tokens. parts: of `name`, each a slice of the t covered tokens.

    code_parts: the same for codes.
    """

    name: str
    parts: tuple[slice, ...]
    code_parts: tuple[slice, ...]

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """In how many ways codes become one vector; the first is the default."""
        several = any(part.stop - part.start > 1 for part in self.code_parts)
        return ("max", "mean") if several else ("none",)


def feature_of(chosen: str, kinds: Mapping[str, slice], who: str) -> Feature:
    """The feature that an option's value names, among the tokens that a coder covers.

    kinds: token kind -> its slice of them. `auto`: CLS where it is covered, the vector of a pooled
    site, else the mean. Errors: UsageError for tokens that it does not cover.
    """
    usual = "cls" if "cls" in kinds else "pooled" if "pooled" in kinds else "mean"
    name = usual if chosen == "auto" else chosen
    codes = _parts(usual if name == "embedding" else name, kinds, who)
    return Feature(name, () if name == "embedding" else codes, codes)


def _parts(name: str, kinds: Mapping[str, slice], who: str) -> tuple[slice, ...]:
    spatial = [kinds[kind] for kind in SPATIAL if kind in kinds]
    found: list[slice] = []
    for part in name.split("+"):
        if part == "mean" and not spatial and name == "mean" and "cls" not in kinds:
            spatial = [slice(0, max(p.stop for p in kinds.values()))]  # registers alone
        tokens = spatial if part == "mean" else [kinds[part]] if part in kinds else []
        if not tokens:
            what = "patches or grid" if part == "mean" else part
            raise UsageError(
                f"the feature '{name}' reads {what}, and {who} covers {', '.join(kinds)}",
                f"choose another of: {', '.join(FEATURES)}",
            )
        found += tokens
    return tuple(found)


def clean_features(batch: Batch, feature: Feature) -> Tensor:
    """[b f] float32 of the untouched activations: once for all SAEs on the same tokens."""
    if feature.name == "embedding":
        return batch.clean_output.embedding_bd.float()
    return batch.shared(f"feature {feature.name}", lambda: _of_tokens(batch.x_btd, feature))


def reconstructed_features(batch: Batch, feature: Feature) -> Tensor:
    """[b f] float32 of the reconstructions; `embedding`: of the spliced pass.

    Errors: those of `SaeBatch`.
    """
    if feature.name == "embedding":
        return batch.spliced_output("sae_tokens").embedding_bd.float()
    return _of_tokens(batch.recon_btd, feature)


def _of_tokens(x_btd: Tensor, feature: Feature) -> Tensor:
    means = [x_btd[:, part].double().mean(dim=1).float() for part in feature.parts]
    return torch.cat(means, dim=1)


def pooled_codes(batch: Batch, feature: Feature, pooling: Pooling) -> Codes:
    """Codes of b images; of `cls+mean` 2 s latents, those of CLS first."""
    n_tokens = batch.n_rows // batch.n_images
    parts = [_pooled(batch.codes, batch.n_images, n_tokens, p, pooling) for p in feature.code_parts]
    return parts[0] if len(parts) == 1 else _beside(parts)


def _pooled(codes: Codes, b: int, t: int, tokens: slice, pooling: Pooling) -> Codes:
    """Per image and latent the maximum, or the mean, over some of the tokens.

    A latent that is silent on some token counts as 0 there.
    """
    row_m, latent_m, value_m = codes.nonzero()
    token_m = row_m % t
    inside_m = (token_m >= tokens.start) & (token_m < tokens.stop)
    image_m = torch.div(row_m[inside_m], t, rounding_mode="floor")
    key_m = image_m * max(codes.d_sae, 1) + latent_m[inside_m]
    value_m = value_m[inside_m]
    n_tokens = tokens.stop - tokens.start
    key_u, where_m, count_u = key_m.unique(return_inverse=True, return_counts=True)
    if pooling == "mean":
        sums_u = torch.zeros(len(key_u), dtype=torch.float64, device=codes.device)
        value_u = (sums_u.index_add_(0, where_m, value_m.double()) / n_tokens).float()
    else:
        low_u = torch.where(count_u < n_tokens, 0.0, -torch.inf).to(value_m.dtype)
        value_u = low_u.scatter_reduce(0, where_m, value_m, "amax")
    kept_u = value_u != 0
    key_u, value_u = key_u[kept_u], value_u[kept_u]
    starts_n1 = max(codes.d_sae, 1) * torch.arange(b + 1, device=codes.device)
    return Codes(
        codes.d_sae,
        torch.searchsorted(key_u, starts_n1),
        key_u % max(codes.d_sae, 1),
        value_u,
    )


def _beside(parts: list[Codes]) -> Codes:
    """The latents of all parts, one part's after the other's, for each row."""
    rows_m = torch.cat([part.rows_m for part in parts])
    widths = [sum(p.d_sae for p in parts[:i]) for i in range(len(parts))]
    latents_m = torch.cat([p.indices_m + w for p, w in zip(parts, widths, strict=True)])
    order_m = rows_m.argsort(stable=True)
    offsets_n1 = torch.stack([part.offsets_n1 for part in parts]).sum(dim=0)
    return Codes(
        sum(part.d_sae for part in parts),
        offsets_n1,
        latents_m[order_m],
        torch.cat([part.values_m for part in parts])[order_m],
    )
