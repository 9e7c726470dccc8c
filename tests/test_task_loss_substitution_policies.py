"""Tokens in `loss_substitution` on a real backbone: what reads them, and who was trained on them.

tiny-dinov2 has CLS, registers and patches, and its heads are linear: of its embedding, which is
CLS, or of what its entry says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import saebench
from saebench.formats import write_sae
from saebench.paths import CONTENT
from saebench.registry import Registry
from saebench.testing import check_sae
from tests.content import sae_entry, write
from tests.small import random_sae

N, TRAIN = 20, 60
SAES = {
    "cls": ("blocks.3", "cls"),
    "patches": ("blocks.3", "patches"),
    "early": ("blocks.1", "cls"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two backbones, which differ in what a linear head reads, each with the SAEs above."""
    root = tmp_path_factory.mktemp("content")
    entry = (CONTENT / "registry/backbones/tiny-dinov2.toml").read_text()
    own_file = "../weights/tiny-dinov2/model.safetensors"
    weights = CONTENT / "registry/weights/tiny-dinov2/model.safetensors"
    assert own_file in entry
    entry = entry.replace(own_file, str(weights))
    for backbone, features in (("of-patches", ["patches"]), ("of-both", ["cls", "patches"])):
        own = entry[: entry.index("[head]")] + f'[head]\nkind = "none"\nfeatures = {features}\n'
        write(root, {f"registry/backbones/{backbone}.toml": own})
        folder = root / "registry/saes" / backbone
        folder.mkdir(parents=True)
        for i, (name, (site, tokens)) in enumerate(SAES.items()):
            write_sae(random_sae(i, k=None, d=64), folder / f"{name}.safetensors")
            text = sae_entry(backbone, site, tokens).replace("sae.safe", f"{name}.safe")
            (folder / f"{name}.toml").write_text(text)
    return root


def run(root: Path, out: Path, backbone: str, *sae: str, **more: Any) -> pd.DataFrame:
    return saebench.run(
        backbone=backbone,
        sae=[f"{backbone}/{name}" for name in sae],
        task="loss_substitution",
        registry=[root],
        out=out,
        limit=N,
        train_limit=TRAIN,
        workers=0,
        **more,
    )


ALL = ["loss_substitution.ablated=all"]


def test_a_splice_that_the_head_cannot_see_scores_nothing(root: Path, tmp_path: Path) -> None:
    """The last block's CLS token is the embedding, and no part of the mean of the patches."""
    rows: Any = run(root, tmp_path, "of-patches", "cls", option=ALL).set_index("metric")
    for metric in ("loss_spliced", "loss_recovered", "kl_spliced", "agreement_spliced"):
        assert pd.isna(rows.loc[metric, "value"])
        assert rows.loc[metric, "note"] == (
            "vacuous: what a linear head reads cannot change with the tokens 'sae_tokens'"
        )
    assert rows.loc["loss_zero", "value"] > rows.loc["loss_clean", "value"]
    assert rows.loc["embedding_cosine_spliced", "value"] < 0.999
    assert set(rows["feature"].dropna()) == {"patches"}
    assert set(rows["solver"].dropna()) == {"logistic"}
    note = rows.loc["loss_clean", "note"]
    assert note.startswith(f"a probe of {TRAIN} train images, λ = ")
    assert set(rows["last_block"]) == {"full"}


def test_an_embedding_that_the_tokens_cannot_reach(root: Path, tmp_path: Path) -> None:
    """Of the same unit the head, which reads the patches too, has its values."""
    rows: Any = run(root, tmp_path, "of-both", "patches", option=ALL).set_index("metric")
    for metric in ("embedding_cosine_spliced", "embedding_nmse_spliced"):
        assert pd.isna(rows.loc[metric, "value"])
        assert rows.loc[metric, "note"] == (
            "vacuous: the embedding cannot change with the tokens 'sae_tokens'"
        )
    assert rows.loc["embedding_nmse_zero", "value"] > 0
    assert rows.loc["kl_spliced", "value"] > 0


@pytest.mark.parametrize("conventions", [False, True])
def test_a_set_with_two_saes_at_one_site(root: Path, tmp_path: Path, conventions: bool) -> None:
    """Who should replace the registers is not said; what can be measured is."""
    rows: Any = run(
        root,
        tmp_path,
        "of-both",
        *SAES,
        splice_together=True,
        option=["loss_substitution.replaced=all"],
        conventions=conventions,
    )
    assert rows["unit_id"].nunique() == 1 + conventions
    why = (
        "none of 'of-both/cls', 'of-both/patches' was trained on the tokens registers of "
        "'blocks.3', and which of them should replace these is not said"
    )
    ours: Any = rows[rows["convention"].isna()].set_index("metric")
    assert ours.loc["loss_spliced", "note"] == ours.loc["loss_recovered", "note"] == why
    assert ours.loc["loss_zero", "value"] > 0
    if conventions:
        of_peers: Any = rows[rows["convention"].notna()].set_index("convention")
        assert of_peers["value"].isna().all()
        assert of_peers.loc["kissane", "note"] == why
        text = "it needs a text tower: a label's text for each image"
        assert of_peers.loc["hugofry", "note"] == text


def test_foreign_tokens_of_every_member_of_a_set(root: Path, tmp_path: Path) -> None:
    """Also of a site that is not the first."""
    rows = run(
        root,
        tmp_path,
        "of-both",
        "early",
        "cls",
        splice_together=True,
        option=["loss_substitution.replaced=patches"],
    ).set_index("metric")
    assert rows.loc["kl_spliced", "note"] == (
        "it was not trained on these of the replaced tokens: patches of blocks.1, "
        "patches of blocks.3"
    )


def test_a_check_says_which_part_of_the_output_sees_the_tokens(root: Path) -> None:
    detail = {}
    for name in ("of-patches/cls", "of-patches/patches", "of-both/cls"):
        checks = check_sae(Registry.load([root]), name)
        (detail[name],) = (c.detail for c in checks if c.name == "its tokens reach the output")
    linear = "what a linear head reads"
    assert detail["of-patches/cls"].endswith(
        f"the embedding changes with them, and {linear} does not"
    )
    assert detail["of-patches/patches"].endswith(
        f"{linear} changes with them, and the embedding does not"
    )
    assert detail["of-both/cls"].endswith("the output changes with them")
