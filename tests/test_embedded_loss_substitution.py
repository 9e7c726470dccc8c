"""Loss substitution on the five embedded backbones and their committed SAEs: the known answers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

import saebench
from saebench.controls import Identity
from saebench.formats import read_entry
from saebench.registry import Registry
from saebench.testing.sample import Sample

NAMES = ("tiny-clip", "tiny-bioclip", "tiny-dinov2", "tiny-vit", "tiny-resnet")
LOSS = {
    "tiny-clip": "zero_shot_ce",
    "tiny-bioclip": "zero_shot_ce",
    "tiny-dinov2": "linear_head_ce",
    "tiny-vit": "head_ce",
    "tiny-resnet": "head_ce",
}
KS = (4, 8, 16)
LIMIT, TRAIN = 256, 512  # images


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def rows(name: str, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The rows of three SAEs and the controls of one backbone."""
    saes = [f"{name}/topk-k{k}" for k in KS]
    controls = ["identity", "zero", "mean", f"{name}/topk-k8@shuffled-decoder"]
    return saebench.run(
        backbone=name,
        sae=[*saes, *controls],
        task="loss_substitution",
        limit=LIMIT,
        train_limit=TRAIN,
        out=tmp_path_factory.mktemp(name),
    )


def value(rows: pd.DataFrame, sae: str, metric: str, variant: str = "") -> float:
    chosen = rows.loc[
        (rows["sae"] == sae)
        & (rows["metric"] == metric)
        & (rows["group"] == "all")
        & (rows["variant"] == variant)
    ]
    assert len(chosen) == 1, f"{len(chosen)} rows of {sae} {metric} [{variant}]"
    assert pd.notna(chosen["value"].iloc[0]), chosen["note"].iloc[0]
    return float(chosen["value"].iloc[0])


def variants(rows: pd.DataFrame, metric: str) -> list[str]:
    return sorted(set(rows.loc[rows["metric"] == metric, "variant"]))


def test_the_head_is_the_entrys(name: str, rows: pd.DataFrame) -> None:
    default = rows[(rows["metric"] == "loss_clean") & (rows["variant"] == "")]
    assert set(default["loss"]) == {LOSS[name]}
    assert set(default["temperature"]) == {"model"}
    assert set(rows["replaced"].dropna()) == set(rows["ablated"].dropna()) == {"sae_tokens"}
    zero_shot = LOSS[name] == "zero_shot_ce"
    # Templates and bare names, each at the model's temperature and at 1.
    assert len(variants(rows, "loss_recovered")) == (4 if zero_shot else 1)


def test_identity_loses_nothing(rows: pd.DataFrame) -> None:
    for variant in variants(rows, "loss_recovered"):
        assert value(rows, "identity", "loss_recovered", variant) == 1
        assert value(rows, "identity", "loss_recovered_mean", variant) == 1
        assert value(rows, "identity", "loss_increase", variant) == 0
        assert value(rows, "identity", "kl_spliced", variant) == 0
        assert value(rows, "identity", "agreement_spliced", variant) == 1
    assert value(rows, "identity", "embedding_nmse_spliced") == 0
    assert value(rows, "identity", "embedding_cosine_spliced") == pytest.approx(1, abs=1e-12)


def test_an_ablation_recovers_nothing_of_itself(rows: pd.DataFrame) -> None:
    for variant in variants(rows, "loss_recovered"):
        assert value(rows, "zero", "loss_recovered", variant) == 0
        assert value(rows, "mean", "loss_recovered_mean", variant) == 0
    for ablation in ("zero", "mean"):
        for measure in ("accuracy", "kl", "agreement", "embedding_nmse", "embedding_cosine"):
            spliced = value(rows, ablation, f"{measure}_spliced")
            assert spliced == value(rows, ablation, f"{measure}_{ablation}")


def test_more_latents_lose_less(name: str, rows: pd.DataFrame) -> None:
    recovered = [value(rows, f"{name}/topk-k{k}", "loss_recovered") for k in KS]
    assert pd.Series(recovered).corr(pd.Series(KS), method="spearman") > 0.8, recovered
    cosines = [value(rows, f"{name}/topk-k{k}", "embedding_cosine_spliced") for k in KS]
    assert cosines == sorted(cosines)


def test_controls_stand_in_their_order(name: str, rows: pd.DataFrame) -> None:
    for metric in ("loss_recovered", "loss_recovered_mean", "embedding_cosine_spliced"):
        by_sae = {sae: value(rows, sae, metric) for sae in rows["sae"].unique()}
        shuffled = by_sae.pop(f"{name}/topk-k8@shuffled-decoder")
        saes = [by_sae[f"{name}/topk-k{k}"] for k in KS]
        assert max(saes) < by_sae["identity"] + 1e-12
        assert shuffled < min(saes)


def test_splices_of_identity_and_of_the_error_give_the_forward_pass(
    name: str, tmp_path: Path
) -> None:
    registry = Registry.load()
    sample = Sample.of(registry, name, None, tmp_path)
    sae = read_entry(registry.sae(f"{name}/topk-k8"))
    forward = sample.backbone.forward(sample.images_b3hw[:16])
    for coder, keep_error in ((Identity(sae.d_model), False), (sae, True)):
        output = sample.batch(coder, 0, 16).spliced_output(keep_error=keep_error)
        assert torch.equal(output.embedding_bd, forward.embedding_bd)
        if forward.logits_bc is not None:
            assert output.logits_bc is not None
            assert torch.equal(output.logits_bc, forward.logits_bc)
    moved = sample.batch(sae, 0, 16).spliced_output()
    assert not torch.equal(moved.embedding_bd, forward.embedding_bd)
