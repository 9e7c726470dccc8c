"""Checks an SAE: it is what its entry says, and does to real activations what an SAE does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saebench.backbones import load_backbone
from saebench.batch import SaeBatch
from saebench.beside import beside_paths
from saebench.coders import chain_of, check_fit, token_kinds
from saebench.data.access import Access
from saebench.errors import SpecError
from saebench.formats import read_entry
from saebench.formats.facts import INPUT
from saebench.images import View
from saebench.loading import check_widths, stacked
from saebench.meta import MetaSae
from saebench.record import Record, shown
from saebench.registry import Registry
from saebench.saes import TILE_BYTES, Coder, Sae
from saebench.specs import BackboneSpec, SaeSpec, SiteSpec
from saebench.testing.report import Check, attempt, of_which, real_images
from saebench.testing.splice import SPLICED, check_splice, images_of
from saebench.weights import verified_path


@dataclass
class _Held:
    """What one check finds and the next ones need."""

    chain: tuple[SaeSpec, ...] = ()
    backbone: BackboneSpec | None = None
    site: SiteSpec | None = None
    saes: dict[str, Sae] = field(default_factory=dict)
    x_nd: Tensor | None = None
    batch: SaeBatch | None = None  # the first of those images, to be spliced


def check_sae(registry: Registry, name: str, *, access: Access | None = None) -> Iterator[Check]:
    """Fits its backbone, is finite, reconstructs real activations better than their mean, splices.

    Each check needs those before it: the first that fails of these is the last. Errors: NotFound.
    """
    registry.saes.path(name)
    held = _Held()

    def declared() -> str:
        held.chain = chain_of(registry, registry.sae(name))
        spec = held.chain[0]
        stated = [f"{key} = {value}" for key, value in spec.semantics.items()]
        return f"{spec.path}" + (f"; it states {', '.join(stated)}" if stated else "")

    def fits() -> str:
        spec, root = held.chain[0], held.chain[-1]
        held.backbone = registry.buildable(spec.backbone)
        held.site = check_fit(held.backbone, root)
        return f"{spec.site} ({root.tokens}) of {held.backbone.name}, width {held.site.width}"

    def reads() -> str:
        held.saes = {link.name: read_entry(link) for link in held.chain}
        return _what(held.saes[name])

    def widths() -> str:
        assert held.site is not None
        check_widths(held.chain, held.saes, held.site.width, held.chain[-1].site)
        return "every width is that of what it reads"

    def activations() -> str:
        assert held.backbone is not None
        held.x_nd, said = _activations(held, registry, access)
        return said

    for title, look in (
        ("its entry is one", declared),
        ("its site and tokens are the backbone's", fits),
        ("its bytes are the entry's", lambda: _bytes(held.chain)),
        ("its file is read, and finite", reads),
        ("what decides its output", lambda: "\n".join(_facts(held.saes[name].record))),
        ("its width is the site's", widths),
        ("real activations reach it", activations),
    ):
        yield (done := attempt(title, look))
        if not done.passed:
            return
    assert held.x_nd is not None
    coder = stacked(held.chain, held.saes)[-1]
    if isinstance(coder, MetaSae):
        yield attempt("it reconstructs the directions below", lambda: _directions(coder))
    yield from _on_activations(coder, held.saes[name], held.x_nd, held.chain[0].l0)
    assert held.batch is not None
    yield from check_splice(held.batch)


# --- what it says -------------------------------------------------------------------------------


def _bytes(chain: Sequence[SaeSpec]) -> str:
    """Errors: WeightsError (missing, altered), SpecError (no weights)."""
    said = []
    for spec in chain:
        path = verified_path(spec)
        if path is None:
            raise SpecError(f"{spec.path}: there are no weights", '[weights]  file = "…"')
        digest = "as declared" if spec.weights.sha256 else "NOT DECLARED: write it in the entry"
        beside = beside_paths(spec, path)
        undeclared = [name for name in beside if not _declared(spec, name)]
        text = f"{path.name}: sha256 {digest}"
        if beside:
            text += f"; with {', '.join(beside)}"
        if undeclared and spec.weights.sha256:
            text += f" (not declared under [weights.beside]: {', '.join(undeclared)})"
        said.append(text)
    return "\n".join(said)


def _declared(spec: SaeSpec, name: str) -> bool:
    beside = spec.weights.beside
    return any(sha256 and key.rpartition("/")[2] == name for key, sha256 in beside.items())


def _what(sae: Sae) -> str:
    kind = "a transcoder: it writes another activation than it reads" if sae.transcoder else ""
    hidden = f"{len(sae.trunk.blocks)} hidden layers" if sae.trunk is not None else ""
    more = [part for part in (kind, hidden, f"stored as {sae.stored_dtype}") if part]
    return f"{sae.architecture}, {sae.d_model} → {sae.d_sae}, {', '.join(more)}"


def _facts(record: Record) -> Iterator[str]:
    yield f"the format {record.format}"
    yield from shown(record)


# --- what it does -------------------------------------------------------------------------------


def _activations(held: _Held, registry: Registry, access: Access | None) -> tuple[Tensor, str]:
    """[n d] what the SAE, or the pair with the one whose decoder it reads, gets to see."""
    root = held.chain[-1]
    assert held.backbone is not None
    assert held.site is not None
    backbone = load_backbone(held.backbone)
    dataset, _, images_b3hw = real_images(backbone, registry, access=access)
    captures = backbone.acts(images_b3hw, [root.site])
    kinds = token_kinds(held.site, root.tokens, who=held.chain[0].name)
    *below, coder = stacked(held.chain, held.saes)

    def seen_of(n: int) -> View:
        view = images_of(backbone, captures, n).view(root.site, kinds)
        for one in below:
            view = view.above(one, held.chain[0].site, TILE_BYTES)
        return view

    held.batch = SaeBatch(seen_of(SPLICED), coder, TILE_BYTES)
    x_nd = seen_of(len(images_b3hw)).x_nd
    said = of_which(dataset, backbone)
    return x_nd, f"{x_nd.shape[0]:,} tokens of {len(images_b3hw)} images of {said}"


def _directions(coder: MetaSae) -> str:
    W_sd = coder.below.W_dec_sd.double()
    left = float((W_sd - coder.directions_sd).square().sum())
    fvu = left / float((W_sd - W_sd.mean(dim=0)).square().sum())
    l0 = float(coder.direction_codes.l0_n().double().mean())
    assert fvu < 1, f"fvu {fvu:.3g} of the decoder's rows: worse than their mean"
    return f"fvu {fvu:.4f} of the {len(W_sd)} decoder rows, with {l0:.4g} latents for each"


def _on_activations(
    coder: Coder, sae: Sae, x_nd: Tensor, stated_l0: float | None
) -> Iterator[Check]:
    codes = coder.encode(x_nd)
    l0 = float(codes.l0_n().double().mean())
    recon_nd = coder.decode(codes)
    transcoder = getattr(coder, "transcoder", False)

    def finite() -> str:
        for what, values in (("codes", codes.values_m), ("its reconstruction", recon_nd)):
            n_bad = int((~torch.isfinite(values)).sum())
            assert n_bad == 0, f"{n_bad} values of {what} are NaN or infinite"
        return "codes and reconstruction are finite"

    def sparse() -> str:
        assert 0 < l0 < sae.d_sae, f"L0 {l0:.4g} of {sae.d_sae} latents"
        if sae.k is not None and coder is sae:
            assert int(codes.l0_n().max()) <= sae.k, f"a row has more than k = {sae.k} latents"
        if stated_l0:
            assert 0.5 < l0 / stated_l0 < 2, f"L0 {l0:.4g}, and its entry states {stated_l0:.4g}"
        return f"L0 {l0:.4g} of {sae.d_sae} latents"

    def better_than_mean() -> str:
        if transcoder:
            return "a transcoder: what it writes is no estimate of what it reads, so not compared"
        centred = (x_nd - x_nd.mean(dim=0)).double().square().sum()
        fvu = float((x_nd - recon_nd).double().square().sum() / centred)
        assert fvu < 1, f"fvu {fvu:.3g}: worse than the mean. {_causes(sae)}"
        return f"fvu {fvu:.4f}, explained variance {1 - fvu:.4f}"

    def alone_or_together() -> str:
        rows = torch.linspace(0, len(x_nd) - 1, 8).long()
        together = coder.encode(x_nd[rows])
        alone = [coder.encode(x_nd[row][None]) for row in rows]
        pairs = {
            "codes": (together.dense(), torch.cat([one.dense() for one in alone])),
            "reconstruction": (
                coder.decode(together),
                torch.cat([coder.decode(one) for one in alone]),
            ),
        }
        worst = 0.0
        for what, (one_nd, other_nd) in pairs.items():
            gap, scale = float((one_nd - other_nd).abs().max()), float(one_nd.abs().max())
            assert gap <= 1e-4 * scale, f"a row's {what} differ by {gap:.3g} with the rows beside"
            worst = max(worst, gap / max(scale, 1e-30))
        return f"eight rows come out alike alone and together (to {worst:.0e})"

    def oriented() -> str:
        # An encoder that reads what its decoder writes points the same way; a transposed or
        # permuted matrix of the right shape does not.
        if sae.trunk is not None or sae.transcoder:
            why = "hidden layers lie" if sae.trunk is not None else "another activation lies"
            return f"{why} between them, so they are not compared"
        cosine_s = torch.nn.functional.cosine_similarity(sae.W_enc_ds.T, sae.W_dec_sd, dim=1)
        mean = float(cosine_s.mean())
        assert mean > 0, f"mean cosine of encoder and decoder {mean:.3f}: is a matrix transposed?"
        return f"mean cosine of encoder and decoder {mean:.3f}"

    def alive() -> str:
        n_alive = len(codes.indices_m.unique())
        assert n_alive, "no latent fires"
        return f"{1 - n_alive / sae.d_sae:.1%} of the latents never fire on these tokens"

    yield attempt("its output is finite", finite)
    yield attempt("its codes are sparse", sparse)
    yield attempt("it reconstructs better than the mean", better_than_mean)
    yield attempt("a row encodes and decodes alike in any company", alone_or_together)
    yield attempt("encoder and decoder point the same way", oriented)
    yield attempt("its latents fire", alive)


def _causes(sae: Sae) -> str:
    """Why an SAE mostly fails on activations; of the input's scaling, what to try next."""
    usual = "The usual causes: wrong site, wrong tokens, before against after a LayerNorm"
    said = {fact.name: fact for fact in sae.record.facts if fact.name in INPUT}
    if not said:
        return f"{usual}, input scaling that the file does not hold"
    if "input" in said:
        other = 'saebench estimate  (remove  input = "raw"  first) finds its mean and scale'
        return f"{usual}; or x was scaled in training, and its input is said to be raw: {other}"
    given = " and ".join(f"{name} ({fact.source})" for name, fact in said.items())
    return f'{usual}; or another input scaling than {given}: try  input = "raw"  in their place'
