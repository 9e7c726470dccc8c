"""Where the last block is run in the short way, a clean pass takes the way of its splices."""

from __future__ import annotations

import numpy as np
import torch

from saebench.backbones import load_backbone
from saebench.batch import SaeBatch
from saebench.calibrate import Place
from saebench.coders import CoderRef
from saebench.controls import Identity
from saebench.images import Images
from saebench.registry import Registry
from saebench.together import Member, Together

KINDS = ("cls", "patches")


def images_at(*sites: str) -> Images:
    backbone = load_backbone(Registry.load([]).backbone("tiny-vit"), last_block="cls")
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    captures = backbone.acts(pixels, sites)
    return Images(backbone, "d", list("abcd"), np.zeros(4, np.int64), {}, 0, captures)


def test_identity_is_exact_whichever_other_sites_are_in_the_run() -> None:
    both, alone = images_at("blocks.2", "blocks.3"), images_at("blocks.2")
    outputs = {}
    for site in ("blocks.2", "blocks.3"):
        seen = SaeBatch(both.view(site, KINDS), Identity(64), 2**20)
        outputs[site] = seen.clean_output.embedding_bd
        assert torch.equal(seen.spliced_output().embedding_bd, outputs[site])
    seen = SaeBatch(alone.view("blocks.2", KINDS), Identity(64), 2**20)
    assert torch.equal(seen.clean_output.embedding_bd, outputs["blocks.2"])
    # The way matters to the last bits, or this test would show nothing.
    assert not torch.equal(outputs["blocks.2"], outputs["blocks.3"])


def test_a_set_that_needs_the_whole_last_block_is_beside_a_clean_pass_that_runs_it() -> None:
    images = images_at("blocks.2")
    members = [
        Member(CoderRef("identity", site, "all"), Place(site, KINDS), Identity(64))
        for site in ("blocks.2", "blocks.3")
    ]
    seen = Together.on(images.backbone, members).batch(images, 2**20)
    clean = seen.clean_output.embedding_bd
    assert torch.equal(seen.spliced_output().embedding_bd, clean)
    short = SaeBatch(images.view("blocks.2", KINDS), Identity(64), 2**20)
    assert not torch.equal(short.clean_output.embedding_bd, clean)
