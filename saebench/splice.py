"""What takes the place of activations at a site, and for which of its tokens.

A policy names the tokens of one image:

    sae_tokens   those that the SAE covers, and so the default of what is replaced and ablated
    all          every token of the site, whatever the SAE was trained on
    cls, patches, registers, …   one token kind

Tokens outside the policy pass through untouched. An ablation puts 0, or the train mean of the
token's kind, in the place of the same tokens, so that numerator and denominator of a share
recovered speak of one thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from saebench.specs import KINDS

if TYPE_CHECKING:
    from saebench.backbones import Output
    from saebench.images import Images

POLICIES: tuple[str, ...] = ("sae_tokens", "all", *KINDS)

Ablation = Literal["zero", "mean"]


def policy_kinds(
    policy: str, layout: Mapping[str, slice], covered: Sequence[str]
) -> tuple[str, ...]:
    """The token kinds that a policy names, of a site's `layout`, for an SAE that covers some.

    Empty where the site has no such tokens.
    """
    if policy == "sae_tokens":
        return tuple(kind for kind in layout if kind in covered)
    if policy == "all":
        return tuple(layout)
    return (policy,) if policy in layout else ()


def replaced_output(images: Images, site: str, parts_btd: Mapping[str, Tensor]) -> Output:
    """Output with other activations [b t d] for some token kinds of a site."""
    capture = images.captures[site]
    acts_btd = with_parts(capture.acts_btd, images.layout(site), parts_btd)
    return images.backbone.resume(site, acts_btd, capture.state)


def ablated_output(images: Images, site: str, kinds: Sequence[str], value: Ablation) -> Output:
    """Output with 0, or the train mean of each kind, for some token kinds of a site."""
    return replaced_output(images, site, {k: ablation(images, site, k, value) for k in kinds})


def ablation(images: Images, site: str, kind: str, value: Ablation) -> Tensor:
    """[1 t d]: what an ablation puts in the place of every image's tokens of a kind."""
    part = images.layout(site)[kind]
    if value == "mean":
        return images.means[site][part].unsqueeze(0)
    acts_btd = images.captures[site].acts_btd
    return acts_btd.new_zeros(1, part.stop - part.start, acts_btd.shape[-1])


def with_parts(
    acts_btd: Tensor, layout: Mapping[str, slice], parts_btd: Mapping[str, Tensor]
) -> Tensor:
    """A copy of a site's activations with those of some token kinds replaced."""
    changed_btd = acts_btd.clone()
    for kind, part_btd in parts_btd.items():
        changed_btd[:, layout[kind]] = part_btd.to(acts_btd.dtype)
    return changed_btd


def error_preserving(x: Tensor, recon: Tensor) -> Tensor:
    """x̂ + (x − x̂), formed in float64 and cast back: x itself, and a check on every splice."""
    return (recon.double() + (x.double() - recon.double())).to(x.dtype)
