"""Checks an SAE: it fits its backbone, and does to real activations what an SAE does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from saebench.backbones import load_backbone
from saebench.coders import chain_of, check_fit, token_kinds
from saebench.data.access import Access
from saebench.formats import read_entry
from saebench.loading import check_widths
from saebench.registry import Registry
from saebench.saes import Sae
from saebench.specs import BackboneSpec
from saebench.testing.report import Check, attempt, of_which, real_images


def check_sae(registry: Registry, name: str, *, access: Access | None = None) -> Iterator[Check]:
    """Fits its backbone, is finite, and reconstructs real activations better than their mean."""
    spec = registry.sae(name)
    chain = chain_of(registry, spec)
    held: dict[str, Any] = {}

    def declared() -> str:
        held["spec"] = backbone_spec = registry.buildable(spec.backbone)
        site = check_fit(backbone_spec, chain[-1])
        return f"{spec.site} ({spec.tokens}) of {backbone_spec.name}, width {site.width}"

    def reads() -> str:
        held["saes"] = {link.name: read_entry(link) for link in chain}
        sae: Sae = held["saes"][name]
        digest = "as declared" if spec.weights.sha256 else "NOT DECLARED: write it in the entry"
        return f"{sae.architecture}, {sae.d_model} → {sae.d_sae}, finite; sha256 {digest}"

    yield (fits := attempt("its site and tokens are the backbone's", declared))
    yield (read := attempt("its file is read", reads))
    if not (fits.passed and read.passed):
        return
    backbone_spec: BackboneSpec = held["spec"]
    saes: Mapping[str, Sae] = held["saes"]
    site = backbone_spec.sites[chain[-1].site]

    def widths() -> str:
        check_widths(chain, saes, site.width, chain[-1].site)
        return "every width is that of what it reads"

    yield (wide := attempt("its width is the site's", widths))
    if not wide.passed:
        return

    def activations() -> str:
        backbone = load_backbone(backbone_spec)
        dataset, _, images_b3hw = real_images(backbone, registry, access=access)
        acts_btd = backbone.acts(images_b3hw, [chain[-1].site])[chain[-1].site].acts_btd.float()
        kinds = token_kinds(site, chain[-1].tokens, who=name)
        x_btd = torch.cat([acts_btd[:, site.kinds[kind]] for kind in kinds], dim=1)  # type: ignore[index]
        x_nd = x_btd.reshape(-1, x_btd.shape[-1])
        for link in reversed(chain[1:]):
            x_nd = saes[link.name].encode(x_nd).dense()
        held["x"] = x_nd
        said = of_which(dataset, backbone)
        return f"{x_nd.shape[0]:,} tokens of {len(images_b3hw)} images of {said}"

    yield (given := attempt("real activations reach it", activations))
    if not given.passed:
        return
    x_nd, sae = held["x"], saes[name]
    yield from _on_activations(sae, x_nd, spec.l0)


def _on_activations(sae: Sae, x_nd: torch.Tensor, stated_l0: float | None) -> Iterator[Check]:
    codes = sae.encode(x_nd)
    l0 = float(codes.l0_n().double().mean())
    recon_nd = sae.decode(codes)
    centred = (x_nd - x_nd.mean(dim=0)).double().square().sum()
    fvu = float((x_nd - recon_nd).double().square().sum() / centred)

    def sparse() -> str:
        assert 0 < l0 < sae.d_sae, f"L0 {l0:.4g} of {sae.d_sae} latents"
        if sae.k is not None and sae.architecture == "topk":
            assert int(codes.l0_n().max()) <= sae.k, f"a row has more than k = {sae.k} latents"
        if stated_l0:
            assert 0.5 < l0 / stated_l0 < 2, f"L0 {l0:.4g}, and its entry states {stated_l0:.4g}"
        return f"L0 {l0:.4g} of {sae.d_sae} latents"

    def better_than_mean() -> str:
        assert fvu < 1, (
            f"fvu {fvu:.3g}: worse than the mean. The usual causes: wrong site, wrong tokens, "
            "input scaling that the file does not hold, before against after a LayerNorm"
        )
        return f"fvu {fvu:.4f}, explained variance {1 - fvu:.4f}"

    def alone_or_together() -> str:
        rows = torch.linspace(0, len(x_nd) - 1, 8).long()
        together = sae.encode(x_nd[rows]).dense()
        alone = torch.cat([sae.encode(x_nd[row][None]).dense() for row in rows])
        gap = float((together - alone).abs().max())
        scale = float(together.abs().max())
        assert gap <= 1e-4 * scale, f"a row's codes differ by {gap:.3g} with the rows beside it"
        return f"eight rows encode alike alone and together (to {gap / max(scale, 1e-30):.0e})"

    def oriented() -> str:
        # An encoder that reads what its decoder writes points the same way; a transposed or
        # permuted matrix of the right shape does not.
        cosine_s = torch.nn.functional.cosine_similarity(sae.W_enc_ds.T, sae.W_dec_sd, dim=1)
        mean = float(cosine_s.mean())
        assert mean > 0, f"mean cosine of encoder and decoder {mean:.3f}: is a matrix transposed?"
        return f"mean cosine of encoder and decoder {mean:.3f}"

    yield attempt("its codes are sparse", sparse)
    yield attempt("it reconstructs better than the mean", better_than_mean)
    yield attempt("a row encodes alike in any company", alone_or_together)
    yield attempt("encoder and decoder point the same way", oriented)
