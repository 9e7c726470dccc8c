"""`loss_substitution` of whole runs against the slow script of `tests.slow_substitution`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import load_file

import saebench
from saebench.formats import write_sae
from tests.content import sae_entry
from tests.slow_substitution import (
    ALL,
    CLS,
    N_TRAIN,
    PATCHES,
    SAES,
    N,
    clip_heads,
    sae_of,
    slow,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A content folder with the SAEs above."""
    root = tmp_path_factory.mktemp("content")
    for name, (backbone, site, tokens) in SAES.items():
        folder = root / "registry/saes" / backbone
        folder.mkdir(parents=True, exist_ok=True)
        write_sae(sae_of(name), folder / f"{name}.safetensors")
        entry = sae_entry(backbone, site, tokens).replace("sae.safetensors", f"{name}.safetensors")
        (folder / f"{name}.toml").write_text(entry)
    return root


def run(root: Path, out: Path, name: str, *options: str, **more: Any) -> pd.DataFrame:
    backbone = SAES[name][0]
    return saebench.run(
        backbone=backbone,
        sae=f"{backbone}/{name}",
        task="loss_substitution",
        registry=[root],
        out=out,
        limit=N,
        train_limit=N_TRAIN,
        option=[f"loss_substitution.{option}" for option in options],
        workers=0,
        **more,
    )


def compare(
    rows: pd.DataFrame,
    expected: Mapping[str, Mapping[str, float]],
    tokens: str = "",
    no_share: tuple[str, ...] = (),
) -> None:
    """Every row has to be in the expected ones.

    tokens: of the variant, what is not the default. no_share: metrics without a value.
    """
    assert len(rows) == sum(len(values) for values in expected.values())
    for head, values in expected.items():
        variant = ";".join(sorted(filter(None, [*head.split(";"), *tokens.split(";")])))
        chosen = rows[rows["variant"] == variant].set_index("metric")
        for metric, value in values.items():
            row = chosen.loc[metric]
            if pd.isna(row["value"]):
                assert metric in no_share
                assert row["note"].startswith("|loss_")
                assert "below its standard error" in row["note"]
                continue
            tight = not metric.startswith(("loss_recovered", "loss_increase"))
            assert row["value"] == pytest.approx(value, rel=2e-6 if tight else 1e-4, abs=1e-6), (
                metric,
                variant,
            )
            assert row["n"] == row["n_images"] == N


# --- comparisons ---------------------------------------------------------------------------------

TOKENS = {"cls": CLS, "patches": PATCHES}


@pytest.mark.parametrize(
    ("name", "options", "replaced", "ablated"),
    [
        ("whole", (), ALL, ALL),
        ("mlp", (), ALL, ALL),
        ("whole", ("replaced=patches",), PATCHES, PATCHES),
        ("whole", ("ablated=cls",), ALL, CLS),
        ("cls", (), CLS, CLS),
        ("cls", ("replaced=all",), ALL, ALL),
        ("cls", ("replaced=patches", "ablated=all"), PATCHES, ALL),
    ],
)
def test_a_vit(
    root: Path, tmp_path: Path, name: str, options: tuple[str, ...], replaced: slice, ablated: slice
) -> None:
    rows = run(root, tmp_path, name, *options)
    no_share = ("loss_recovered", "loss_recovered_mean") if name == "mlp" else ()
    compare(rows, slow(name, replaced, ablated, TOKENS), ";".join(options), no_share)
    assert set(rows["loss"].dropna()) == {"head_ce"}
    if "replaced=all" in options:
        (note,) = set(rows.loc[rows["metric"] == "loss_spliced", "note"])
        assert note == "it was not trained on these of the replaced tokens: patches"


def test_a_resnet(root: Path, tmp_path: Path) -> None:
    rows = run(root, tmp_path, "map")
    grid = slice(0, 16)
    compare(rows, slow("map", grid, grid, {"grid": grid}))


@pytest.mark.parametrize(("name", "part"), [("clip", PATCHES), ("bioclip", ALL)])
def test_a_clip_model_by_four_heads(root: Path, tmp_path: Path, name: str, part: slice) -> None:
    rows = run(root, tmp_path, name)
    compare(rows, slow(name, part, part, TOKENS, clip_heads(SAES[name][0])))
    assert set(rows["loss"].dropna()) == {"zero_shot_ce"}


@pytest.mark.filterwarnings("ignore:the probe of")  # so few images lack some classes
def test_a_model_without_a_head_by_its_probe(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    rows = run(root, tmp_path / "out", "dino")
    (probe,) = (tmp_path / "store/artifacts/linear_head").glob("*/data.safetensors")
    arrays = {name: array.double().numpy() for name, array in load_file(probe).items()}
    heads = {"": lambda e: e @ arrays["W_dc"] + arrays["b_c"]}
    tokens = {"cls": slice(0, 1), "registers": slice(1, 5), "patches": slice(5, 69)}
    everything = slice(0, 69)
    # So few images for a probe leave the ablations within their standard error.
    no_share = ("loss_recovered", "loss_recovered_mean")
    compare(rows, slow("dino", everything, everything, tokens, heads), no_share=no_share)
    assert set(rows["loss"].dropna()) == {"linear_head_ce"}


# --- what a whole run has to keep ----------------------------------------------------------------


def test_patches_at_the_last_block_are_vacuous(root: Path, tmp_path: Path) -> None:
    rows = run(root, tmp_path, "late")
    clean = rows["metric"].str.endswith("_clean")
    assert rows.loc[clean, "value"].notna().all()
    assert rows.loc[~clean, "value"].isna().all()
    assert rows.loc[~clean, "note"].str.startswith("vacuous").all()
    seen = run(root, tmp_path, "late", "replaced=cls")
    assert seen["value"].notna().all()


def test_tokens_that_are_not_there(root: Path, tmp_path: Path) -> None:
    rows = run(root, tmp_path, "whole", "replaced=registers")
    row = rows[rows["metric"] == "loss_recovered"].iloc[0]
    assert pd.isna(row["value"])
    assert row["note"] == "the site blocks.2 has no tokens 'registers'"


def values(rows: pd.DataFrame) -> pd.DataFrame:
    key = ["metric", "variant"]
    return rows.sort_values(key).set_index(key)[["value", "ci_low", "ci_high", "n"]]


def test_batches_of_another_size_agree_and_shared_passes_change_nothing(
    root: Path, tmp_path: Path
) -> None:
    """Contract (c), 1e-6 on sums; and an SAE alone has the bits that it has among others."""
    alone = run(root, tmp_path / "alone", "whole")
    parts = values(run(root, tmp_path / "parts", "whole", batch_size=7))
    for key, row in values(alone).iterrows():
        tight = not str(key[0]).startswith("loss_recovered")  # type: ignore[index]
        assert parts.loc[key, "value"] == pytest.approx(  # type: ignore[index]
            row["value"], rel=1e-6 if tight else 1e-5, abs=1e-7
        ), key
    together = saebench.run(
        backbone="tiny-vit",
        sae=["tiny-vit/whole", "tiny-vit/mlp", "tiny-vit/cls", "zero"],
        task="loss_substitution",
        registry=[root],
        out=tmp_path / "together",
        limit=N,
        train_limit=N_TRAIN,
        workers=0,
    )
    same = values(together[together["sae"] == "tiny-vit/whole"])
    pd.testing.assert_frame_equal(same, values(alone), check_exact=True)
