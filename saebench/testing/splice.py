"""Checks a splice: what comes back where x itself is put in its place, and who sees the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from saebench.backbones import Backbone, Capture, Output, Reads
from saebench.batch import SaeBatch
from saebench.images import Images
from saebench.splice import with_parts
from saebench.testing.report import Check, attempt

SPLICED = 8  # images that a splice is tried on
READS: Mapping[Reads, str] = {"embedding": "the embedding", "features": "what a linear head reads"}
ELSEWHERE = 1e-5  # of the largest value: what may differ where not every bit can be the same


def images_of(backbone: Backbone, captures: Mapping[str, Capture], n: int) -> Images:
    """The first n images of some captures, without names and labels."""
    few = {
        site: Capture(c.acts_btd[:n], {name: x[:n] for name, x in c.state.items()})
        for site, c in captures.items()
    }
    n = min(n, *(len(capture.acts_btd) for capture in few.values()))
    ids, labels_b = [f"image {i}" for i in range(n)], np.zeros(n, dtype=np.int64)
    return Images(backbone, "check", ids, labels_b, {}, 0, few)


def check_splice(batch: SaeBatch) -> Iterator[Check]:
    """x̂ + (x − x̂) in the place of x changes nothing; and whether the output sees the tokens."""
    root = batch.view.root
    backbone, kinds = root.images.backbone, tuple(batch.kinds)

    def preserved() -> str:
        if batch.coder.transcoder:
            return "a transcoder: what it writes has no place there, so not spliced"
        clean = batch.clean_output
        text = agrees(clean, batch.spliced_output(keep_error=True), backbone)
        plain = batch.spliced_output()
        cosine_b = torch.nn.functional.cosine_similarity(
            clean.embedding_bd.double(), plain.embedding_bd.double(), dim=1
        )
        return (
            f"with its error added back, the clean output {text}; "
            f"without, embeddings of mean cosine {float(cosine_b.mean()):.4f}"
        )

    def seen() -> str:
        named = f"{', '.join(kinds)} at {root.site}"
        changes: list[Reads] = [reads for reads in READS if backbone.sees(root.site, kinds, reads)]
        if len(changes) == len(READS):
            return f"{named}: the output changes with them"
        if changes:
            (other,) = (text for reads, text in READS.items() if reads not in changes)
            return f"{named}: {READS[changes[0]]} changes with them, and {other} does not"
        return (
            f"vacuous: the output of '{backbone.spec.name}' does not depend on {named}, so what "
            "it loses by a splice there says nothing of an SAE"
        )

    yield attempt("it can be spliced", preserved)
    yield attempt("its tokens reach the output", seen)


def spliced_at(images: Images, site: str) -> str:
    """Puts the activations of a site, kind by kind, in their own place; says which are not seen.

    Errors: AssertionError where the output is not that of the untouched images.
    """
    backbone, layout, capture = images.backbone, images.layout(site), images.captures[site]
    parts = {kind: capture.acts_btd[:, part].clone() for kind, part in layout.items()}
    acts_btd = with_parts(torch.full_like(capture.acts_btd, torch.nan), layout, parts)
    agrees(images.clean_output(site), backbone.resume(site, acts_btd, capture.state), backbone)
    unseen = [kind for kind in layout if not backbone.sees(site, (kind,))]
    return f"; does not depend on its {', '.join(unseen)}" if unseen else ""


def agrees(clean: Output, other: Output, backbone: Backbone) -> str:
    """How two outputs agree. Errors: AssertionError where they do not: on the CPU in every bit."""
    worst = 0.0
    for name in ("embedding_bd", "logits_bc", "features_bd"):
        a, b = getattr(clean, name), getattr(other, name)
        if a is None:
            continue
        gap = float((a.double() - b.double()).abs().max()) / max(float(a.abs().max()), 1e-12)
        allowed = 0.0 if backbone.device.type == "cpu" else ELSEWHERE
        assert gap <= allowed, f"{name.partition('_')[0]} differs by {gap:.3g} of its largest value"
        worst = max(worst, gap)
    return "bit for bit" if worst == 0 else f"to {worst:.1e} of its largest value"
