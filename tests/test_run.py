"""Whole runs on a small real setting: known answers, the numerical contract, resume, failures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import saebench
from saebench import api, evaluation, runner, units
from saebench.backbones import Backbone
from saebench.batch import SaeBatch
from saebench.errors import Mismatch, ResultsError, UsageError, is_out_of_memory
from saebench.images import Images
from saebench.results import ResultsFolder
from saebench.runconfig import RunConfig
from saebench.saes import Sae
from saebench.tiles import SMALLEST_TILE, Tiles
from tests.small import activations, add_sae, random_sae, setting

TASKS = ("reconstruction", "sparsity", "dead_neurons")
N = 96


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return setting(tmp_path_factory.mktemp("content"))


def run(root: Path, out: Path, **options: Any) -> pd.DataFrame:
    defaults = {"backbone": "small", "task": TASKS, "limit": N, "train_limit": 64}
    return saebench.run(registry=[root], out=out, **{**defaults, **options})


@pytest.fixture(scope="module")
def rows(root: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return run(root, tmp_path_factory.mktemp("out") / "results")


def value(
    rows: pd.DataFrame, sae: str, metric: str, group: str = "all", tokens: str = "all"
) -> float:
    chosen = rows[
        (rows["sae"] == sae)
        & (rows["metric"] == metric)
        & (rows["group"] == group)
        & (rows["tokens"] == tokens)
        & (rows["variant"] == "")
    ]
    assert len(chosen) == 1, f"{len(chosen)} rows of {sae} {metric} {group}"
    return float(chosen["value"].iloc[0])


def values(rows: pd.DataFrame) -> pd.DataFrame:
    """The measured part of rows, in a canonical order."""
    key = ["unit_id", "split", "group", "metric", "variant"]
    columns = [*key, "sae", "value", "ci_low", "ci_high", "n", "n_images", "note"]
    return rows[columns].sort_values(key).reset_index(drop=True)


# --- known answers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def x(root: Path) -> np.ndarray:
    """[images tokens d] of the evaluation images, by a plain hook of timm, in float64."""
    return activations(root, "shapes", "test", N).astype(np.float64)


@pytest.fixture(scope="module")
def x_train(root: Path) -> np.ndarray:
    return activations(root, "shapes", "train", 64).astype(np.float64)


def fvu(x: np.ndarray, recon: np.ndarray) -> float:
    x, recon = x.reshape(-1, x.shape[-1]), recon.reshape(-1, x.shape[-1])
    return float(((x - recon) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


def test_identity_reconstructs_exactly(rows: pd.DataFrame) -> None:
    for group in ("all", "cls", "patches"):
        assert value(rows, "identity", "fvu", group) == 0
        assert value(rows, "identity", "mse", group) == 0
        assert value(rows, "identity", "cosine", group) == pytest.approx(1, abs=1e-12)


def test_zero_has_its_closed_form(rows: pd.DataFrame, x: np.ndarray) -> None:
    flat = x.reshape(-1, x.shape[-1])
    expected = 1 + len(flat) * (flat.mean(0) ** 2).sum() / ((flat - flat.mean(0)) ** 2).sum()
    assert value(rows, "zero", "fvu") == pytest.approx(expected, rel=1e-6)
    assert value(rows, "zero", "l0") == 0


def test_mean_is_the_train_mean_of_each_token_kind(
    rows: pd.DataFrame, x: np.ndarray, x_train: np.ndarray
) -> None:
    for group, part in (("cls", slice(0, 1)), ("patches", slice(1, None))):
        flat, train = x[:, part].reshape(-1, 16), x_train[:, part].reshape(-1, 16)
        distance = ((train.mean(0) - flat.mean(0)) ** 2).sum()
        expected = 1 + len(flat) * distance / ((flat - flat.mean(0)) ** 2).sum()
        assert value(rows, "mean", "fvu", group) == pytest.approx(expected, rel=1e-6)


def test_pca_is_the_best_rank_k_of_the_train_tokens(
    rows: pd.DataFrame, x: np.ndarray, x_train: np.ndarray
) -> None:
    train = x_train.reshape(-1, 16)
    _, _, axes = np.linalg.svd(train - train.mean(0), full_matrices=False)
    projected = (x - train.mean(0)) @ axes[:4].T @ axes[:4] + train.mean(0)
    assert value(rows, "pca-4", "fvu") == pytest.approx(fvu(x, projected), rel=1e-5)


def test_an_sae_equals_its_numpy_twin(rows: pd.DataFrame, x: np.ndarray) -> None:
    sae = random_sae(0)
    flat = x.reshape(-1, 16)
    W_dec, bias = sae.W_dec_sd.double().numpy(), sae.b_dec_d.double().numpy()
    pre = (flat - bias) @ W_dec.T
    kept = np.argsort(-pre, axis=1)[:, :4]
    codes = np.zeros_like(pre)
    np.put_along_axis(codes, kept, np.maximum(np.take_along_axis(pre, kept, 1), 0), 1)
    assert value(rows, "small/a", "fvu") == pytest.approx(fvu(flat, codes @ W_dec + bias), rel=1e-6)
    assert value(rows, "small/a", "l0") == pytest.approx((codes != 0).sum(1).mean(), rel=1e-3)
    assert value(rows, "small/a", "l0") <= 4


def test_a_token_set_sees_its_own_tokens_alone(rows: pd.DataFrame, x: np.ndarray) -> None:
    of_cls = rows[(rows["sae"] == "small/cls") & (rows["metric"] == "fvu")]
    assert set(of_cls["n"]) == {N}
    assert value(rows, "zero", "fvu", "cls", tokens="cls") == pytest.approx(
        value(rows, "zero", "fvu", "cls"), rel=1e-12
    )


def test_an_sae_on_an_sae_reads_its_codes(root: Path, rows: pd.DataFrame, x: np.ndarray) -> None:
    codes = random_sae(0).encode(torch.from_numpy(x.reshape(-1, 16)).float()).dense()
    meta = random_sae(4, d=48)
    expected = fvu(codes.numpy(), meta.decode(meta.encode(codes)).numpy())
    assert value(rows, "small/meta", "fvu") == pytest.approx(expected, rel=1e-4)
    assert set(rows[rows["sae"] == "small/meta"]["depth"]) == {2}


def test_the_random_control_is_no_better_than_chance_and_no_worse_than_its_mean(
    rows: pd.DataFrame,
) -> None:
    random = rows[rows["sae"].str.endswith("@random") & (rows["metric"] == "fvu")]
    random = random[(random["group"] == "all")]
    assert (random["value"] < 1.05).all()  # the scale is fitted, so it cannot lose to b = mean
    assert value(rows, "small/a", "l0") == pytest.approx(4, abs=0.5)


def test_every_row_says_whose_it_is(rows: pd.DataFrame) -> None:
    assert set(rows["backbone"]) == {"small"}
    assert rows["note"][rows["value"].isna()].str.len().gt(0).all()
    intervals = rows[rows["metric"].isin(["fvu", "mse", "l0"]) & ~rows["sae_recipe"].eq("control")]
    assert (intervals["ci_low"] <= intervals["value"]).all()
    assert (intervals["value"] <= intervals["ci_high"]).all()


# --- the numerical contract --------------------------------------------------------------------


def test_the_order_of_saes_waves_and_other_tasks_change_no_bit(
    root: Path, rows: pd.DataFrame, tmp_path: Path
) -> None:
    alone = run(root, tmp_path / "alone", sae="small/b", task="reconstruction")
    waves = run(root, tmp_path / "waves", sae=["small/b", "small/relu", "small/a"], memory="1KB")
    for found in (alone, waves):
        expected = values(rows[rows["unit_id"].isin(found["unit_id"])])
        pd.testing.assert_frame_equal(values(found), expected, check_exact=True)


def test_another_batch_size_moves_sums_by_a_rounding(
    root: Path, rows: pd.DataFrame, tmp_path: Path
) -> None:
    other = values(run(root, tmp_path / "r", batch_size=7, sae=["small/a", "small/relu"]))
    same = values(rows[rows["unit_id"].isin(other["unit_id"])])
    metrics = same["metric"].isin(["mse", "fvu", "cosine", "l1"])
    np.testing.assert_allclose(
        other["value"][metrics].astype(float), same["value"][metrics].astype(float), rtol=1e-6
    )
    pd.testing.assert_series_equal(other["unit_id"], same["unit_id"])


def test_limits_nest(root: Path, rows: pd.DataFrame, tmp_path: Path) -> None:
    fewer = run(root, tmp_path / "r", limit=32, sae="zero", task="reconstruction")
    assert not set(fewer["unit_id"]) & set(rows["unit_id"])
    assert set(fewer["n_images"]) == {32}


# --- results -----------------------------------------------------------------------------------


def test_the_folder_reads_as_its_table(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    returned = run(root, out, sae=["small/a", "zero"])
    table = pd.read_parquet(out / "results.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(out), table)
    assert len(table) == len(returned)


def test_paired_replicates_of_two_runs_agree(root: Path, tmp_path: Path) -> None:
    for out, sae in (("one", ["small/a"]), ("two", ["small/b", "small/a"])):
        run(root, tmp_path / out, sae=sae, task="reconstruction")
    one = ResultsFolder(tmp_path / "one").replicates()
    two = ResultsFolder(tmp_path / "two").replicates(one["unit_id"].unique())
    pd.testing.assert_frame_equal(one, two)


def test_what_is_done_is_not_done_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(root, tmp_path / "r", sae="small/a")
    monkeypatch.setattr(runner, "load_backbone", None)  # a call would fail
    again = run(root, tmp_path / "r", sae="small/a")
    pd.testing.assert_frame_equal(values(first), values(again))


def test_overwrite_all_measures_again(root: Path, tmp_path: Path) -> None:
    first = run(root, tmp_path / "r", sae="small/a", task="sparsity")
    again = run(root, tmp_path / "r", sae="small/a", task="sparsity", overwrite="all")
    assert set(first["run_id"]) != set(again["run_id"])
    pd.testing.assert_frame_equal(values(first), values(again))


def test_a_dry_run_writes_nothing(root: Path, tmp_path: Path) -> None:
    config = api.config_of(registry=[root], backbone="small", out=tmp_path / "r", dry_run=True)
    assert api.plan_run(config).todo
    assert not (tmp_path / "r").exists()
    with pytest.raises(UsageError, match="dry run"):
        api.execute(config)


# --- failures ----------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A setting of its own, to be damaged."""
    return setting(tmp_path / "content")


def failures(out: Path) -> dict[str, str]:
    found = ResultsFolder(out).errors().values()
    return {e["identity"]["sae"]["name"]: e["error"] for e in found}


def test_a_truncated_file_fails_its_sae_and_the_others_finish(broken: Path, tmp_path: Path) -> None:
    file = broken / "registry/saes/small/a.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="units failed"):
        found = run(broken, tmp_path / "r", sae=["small/a", "small/b"])
    assert set(found["sae"]) == {"small/b"}
    assert set(failures(tmp_path / "r")) == {"small/a"}


def test_a_failed_unit_is_tried_again_unless_told_never(broken: Path, tmp_path: Path) -> None:
    file = broken / "registry/saes/small/a.safetensors"
    whole = file.read_bytes()
    entry = broken / "registry/saes/small/a.toml"
    from saebench.weights import file_sha256

    entry.write_text(entry.read_text() + f'\nsha256 = "{file_sha256(file)}"\n')
    file.write_bytes(whole[:-100])
    with pytest.warns(UserWarning, match="units failed"):
        run(broken, tmp_path / "r", sae="small/a")
    assert "not the file that" in failures(tmp_path / "r")["small/a"]
    file.write_bytes(whole)
    assert len(run(broken, tmp_path / "r", sae="small/a", overwrite="never")) == 0
    assert set(run(broken, tmp_path / "r", sae="small/a")["sae"]) == {"small/a"}
    assert not failures(tmp_path / "r")


def test_nan_weights_fail_their_sae_alone(broken: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = broken / "registry/saes/small/a.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors["W_enc"][0, 0] = float("nan")
    save_file(tensors, file, metadata)
    with pytest.warns(UserWarning, match="units failed"):
        found = run(broken, tmp_path / "r", sae=["small/a", "small/b"])
    assert set(found["sae"]) == {"small/b"}
    assert "NaN" in failures(tmp_path / "r")["small/a"]


def test_an_sae_of_another_width_is_refused(broken: Path, tmp_path: Path) -> None:
    add_sae(broken, "wide", random_sae(0, d=24))
    with pytest.warns(UserWarning, match="units failed"):
        run(broken, tmp_path / "r", sae=["small/wide", "small/b"])
    assert (
        "reads 24 dimensions, and the site 'blocks.1' has 16"
        in failures(tmp_path / "r")["small/wide"]
    )


def test_a_reconstruction_that_overflows_fails_alone(broken: Path, tmp_path: Path) -> None:
    sae = random_sae(0)
    huge = Sae(
        W_enc_ds=sae.W_enc_ds * 1e30,
        b_enc_s=sae.b_enc_s,
        W_dec_sd=sae.W_dec_sd * 1e30,
        b_dec_d=sae.b_dec_d,
        activation=sae.activation,
        architecture="topk",
    )
    add_sae(broken, "huge", huge)
    with pytest.warns(UserWarning, match="units failed"):
        found = run(broken, tmp_path / "r", sae=["small/huge", "small/b"])
    assert set(found["sae"]) == {"small/b"}
    assert "infinite" in failures(tmp_path / "r")["small/huge"]


def test_a_task_that_raises_fails_alone(broken: Path, tmp_path: Path) -> None:
    path = broken / "tasks/rows.py"
    path.write_text(
        path.read_text().replace(
            'self.parts["rows"].add', "raise ValueError('oh'); self.parts[\"rows\"].add"
        )
    )
    with pytest.warns(UserWarning, match="units failed"):
        found = run(broken, tmp_path / "r", sae="small/b", task=["rows", "sparsity"])
    assert set(found["task"]) == {"sparsity"}
    assert failures(tmp_path / "r") == {"small/b": "oh"}


def test_non_finite_activations_fail_what_reads_them(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Backbone.acts

    def acts(self: Backbone, images: torch.Tensor, sites: Any) -> Any:
        captures = honest(self, images, sites)
        with torch.inference_mode():
            for capture in captures.values():
                capture.acts_btd[:, 0] = float("inf")  # CLS alone
        return captures

    run(root, tmp_path / "warm", sae=["small/b"])  # so that train statistics are there
    monkeypatch.setattr(Backbone, "acts", acts)
    with pytest.warns(UserWarning, match="units failed"):
        run(root, tmp_path / "r", sae=["small/b", "small/cls"])
    assert "NaN or infinite near image shapes/" in failures(tmp_path / "r")["small/b"]


def test_damaged_backbone_weights_end_its_group_with_a_record(broken: Path, tmp_path: Path) -> None:
    (broken / "registry/backbones/small.safetensors").write_bytes(b"<!DOCTYPE html>")
    with pytest.warns(UserWarning, match="units failed"):
        assert len(run(broken, tmp_path / "r", sae=["small/a", "zero"])) == 0
    assert {"small/a", "zero"} == set(failures(tmp_path / "r"))
    assert "web page" in failures(tmp_path / "r")["zero"]


def test_what_cannot_be_written_is_said_before_anything_is_computed(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="is a file"):
        run(root, tmp_path / "file")
    with pytest.raises(ResultsError):
        run(root, tmp_path / "file" / "below")


def test_an_sae_of_another_backbone_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match="belongs to the backbone 'small'"):
        run(root, tmp_path / "r", backbone="tiny-vit", sae="small/a")


def nan_in_first_train_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, seen = Backbone.acts, []

    def acts(self: Backbone, images: torch.Tensor, sites: Any) -> Any:
        captures = honest(self, images, sites)
        seen.append(1)
        if len(seen) == 1:
            with torch.inference_mode():
                captures["blocks.1"].acts_btd[0, 0, 0] = float("nan")
        return captures

    monkeypatch.setattr(Backbone, "acts", acts)


def test_statistics_of_non_finite_activations_are_never_stored(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    with monkeypatch.context() as patch:
        nan_in_first_train_batch(patch)
        with pytest.warns(UserWarning, match="units failed"):
            assert len(run(root, tmp_path / "r", sae=["small/a", "mean"])) == 0
    assert "NaN or infinite near image shapes/train" in failures(tmp_path / "r")["small/a"]
    found = run(root, tmp_path / "r", sae=["small/a", "mean"])
    assert set(found["sae"]) == {"small/a", "mean"}
    assert found.query("metric == 'fvu' and group == 'all'")["value"].notna().all()


def test_train_statistics_belong_to_their_dataset_and_limit(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saebench.store import Store

    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    entry = broken / "registry/datasets/mine.toml"
    entry.write_text('source = "shapes"\nrevision = "1"\n')
    names = ["small/a", "small/a@random"]
    run(broken, tmp_path / "1", dataset="mine", sae=names)
    entry.write_text('source = "shapes"\nrevision = "2"\n')
    run(broken, tmp_path / "2", dataset="mine", sae=names)
    assert len(Store().ids("site_mean")) == 2
    # more train images move the mean, and with it the scale that is fitted around it
    run(broken, tmp_path / "3", dataset="mine", sae=names, train_limit=300)
    run(broken, tmp_path / "4", dataset="mine", sae=names, train_limit=400)
    assert len(Store().ids("random_scale")) == 4


def test_a_changed_task_under_the_same_version_is_warned_about(
    broken: Path, tmp_path: Path
) -> None:
    import sys

    run(broken, tmp_path / "r", sae="small/a", task="rows")
    path = broken / "tasks/rows.py"
    path.write_text(path.read_text() + "\n# changed\n")
    for name in [name for name in sys.modules if name.startswith("saebench_tasks.rows")]:
        del sys.modules[name]
    with pytest.warns(UserWarning, match="file of the task 'rows' has changed"):
        run(broken, tmp_path / "r", sae="small/a", task="rows")


def test_an_sae_without_its_file_is_left_out_and_the_others_finish(
    broken: Path, tmp_path: Path
) -> None:
    (broken / "registry/saes/small/relu.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"small/relu was left out.*is not there"):
        found = run(broken, tmp_path / "r", sae="small/*", task="sparsity")
    assert {"small/a", "small/b"} <= set(found["sae"])


def test_conventions_stand_beside_the_plain_rows_once(root: Path, tmp_path: Path) -> None:
    plain = run(root, tmp_path / "r", sae="small/a")
    both = run(root, tmp_path / "r", sae="small/a", conventions=True)
    table = pd.read_parquet(tmp_path / "r")
    key = ["sae", "task", "group", "metric", "variant"]
    assert not table.duplicated(key).any()
    assert len(both) > len(plain)
    openai = table.query("convention == 'openai' and metric == 'nmse' and group == 'all'")
    x = activations(root, "shapes", "test", N).astype(np.float64).reshape(-1, 16)
    sae = random_sae(0)
    recon = sae.decode(sae.encode(torch.from_numpy(x).float())).double().numpy()
    expected = (((x - recon) ** 2).sum(1) / (x**2).sum(1)).mean()
    assert openai["value"].item() == pytest.approx(expected, rel=1e-5)


# --- memory ------------------------------------------------------------------------------------


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Encoding runs out of memory for more than 16 images; what was tried: (tile, images)."""
    tried: list[tuple[int, int]] = []
    honest = Sae.encode

    def encode(self: Sae, x_nd: torch.Tensor, *, tile_bytes: int = 2**28) -> Any:
        tried.append((tile_bytes, len(x_nd) // 17))
        if len(x_nd) > 16 * 17:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return honest(self, x_nd, tile_bytes=tile_bytes)

    monkeypatch.setattr(Sae, "encode", encode)
    return tried


def test_out_of_memory_halves_the_tile_then_the_batch_and_goes_on(
    root: Path, rows: pd.DataFrame, tmp_path: Path, tight: list[tuple[int, int]]
) -> None:
    found = values(run(root, tmp_path / "r", sae="small/a"))
    halvings = [(256, 64), (128, 64), (64, 64), (32, 64), (16, 64), (8, 64), (4, 64), (4, 32)]
    assert [(tile >> 20, images) for tile, images in tight[:9]] == [*halvings, (4, 16)]
    same = values(rows[rows["unit_id"].isin(found["unit_id"])])
    fvus = same["metric"].eq("fvu")
    np.testing.assert_allclose(
        found["value"][fvus].astype(float), same["value"][fvus].astype(float), rtol=1e-6
    )
    assert (found["n"] == same["n"]).all()  # no image was seen twice


def test_tiles_end_at_the_smallest() -> None:
    tiles = Tiles(SMALLEST_TILE * 2, 4)
    steps = []
    while tiles.halve():
        steps.append((tiles.tile_bytes, tiles.batch_size))
    assert steps == [(SMALLEST_TILE, n) for n in (4, 2, 1)]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


# --- one pass, segments ------------------------------------------------------------------------


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(units, "SEGMENT", 40)
    monkeypatch.setattr(evaluation, "SEGMENT", 40)
    return 40


def test_the_backbone_runs_once_for_all_saes_and_tasks(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, tmp_path / "warm", sae="small/a")
    seen: list[int] = []
    honest = Backbone.acts

    def acts(self: Backbone, images: torch.Tensor, sites: Any) -> Any:
        seen.append(len(images))
        return honest(self, images, sites)

    encoded: list[int] = []
    honest_encode = Sae.encode

    def encode(self: Sae, x_nd: torch.Tensor, **options: Any) -> Any:
        encoded.append(len(x_nd))
        return honest_encode(self, x_nd, **options)

    monkeypatch.setattr(Backbone, "acts", acts)
    monkeypatch.setattr(Sae, "encode", encode)
    run(root, tmp_path / "r", sae=["small/a", "small/b", "small/relu"])
    assert sum(seen) == N
    assert sum(encoded) == 3 * N * 17


def test_a_run_cut_off_between_segments_goes_on_bit_for_bit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_segments: int
) -> None:
    whole = run(root, tmp_path / "whole", sae=["small/a", "zero"])

    honest = runner.GroupRun._segment
    calls: list[int] = []

    def interrupted(self: Any, segment: int, *rest: Any) -> Any:
        if segment == 2:
            raise KeyboardInterrupt
        calls.append(segment)
        return honest(self, segment, *rest)

    monkeypatch.setattr(runner.GroupRun, "_segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "cut", sae=["small/a", "zero"])
    assert calls == [0, 1]
    assert not ResultsFolder(tmp_path / "cut").unit_ids()
    monkeypatch.setattr(runner.GroupRun, "_segment", honest)
    resumed: list[int] = []

    def counted(self: Any, segment: int, *rest: Any) -> Any:
        resumed.append(segment)
        return honest(self, segment, *rest)

    monkeypatch.setattr(runner.GroupRun, "_segment", counted)
    found = run(root, tmp_path / "cut", sae=["small/a", "zero"])
    assert resumed == [2]
    pd.testing.assert_frame_equal(values(found), values(whole), check_exact=True)
    assert not list((tmp_path / "cut/_partial").iterdir())


def test_a_damaged_segment_is_computed_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_segments: int
) -> None:
    whole = run(root, tmp_path / "whole", sae="small/a", task="reconstruction")
    honest = runner.GroupRun._segment

    def interrupted(self: Any, segment: int, *rest: Any) -> Any:
        if segment == 2:
            raise KeyboardInterrupt
        return honest(self, segment, *rest)

    monkeypatch.setattr(runner.GroupRun, "_segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "cut", sae="small/a", task="reconstruction")
    monkeypatch.setattr(runner.GroupRun, "_segment", honest)
    (state,) = (tmp_path / "cut/_partial").rglob("*0.state")
    state.write_bytes(state.read_bytes()[:-7] + b"damaged")
    with pytest.warns(UserWarning, match="computed anew"):
        found = run(root, tmp_path / "cut", sae="small/a", task="reconstruction")
    pd.testing.assert_frame_equal(values(found), values(whole), check_exact=True)


def test_splicing_the_identity_leaves_the_output_as_it_is(root: Path) -> None:
    from saebench.backbones import load_backbone
    from saebench.controls import Identity
    from saebench.registry import Registry

    registry = Registry.load([root])
    backbone = load_backbone(registry.backbone("small"))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    captures = backbone.acts(images, ["blocks.1"])
    shared = Images(backbone, "d", list("abcd"), np.zeros(4, np.int64), {}, 0, captures)
    seen = SaeBatch(shared.view("blocks.1", ("cls", "patches")), Identity(16), 2**20)
    clean = backbone.forward(images).embedding_bd
    for replaced in ("sae_tokens", "cls", "patches"):
        assert torch.equal(seen.spliced_output(replaced).embedding_bd, clean)
    assert torch.equal(seen.clean_output.embedding_bd, clean)
    with pytest.raises(UsageError, match="which has cls, patches"):
        seen.spliced_output("registers")


def test_an_sae_on_an_sae_is_spliced_through_its_chain(root: Path) -> None:
    from saebench.backbones import load_backbone
    from saebench.controls import Identity
    from saebench.registry import Registry

    backbone = load_backbone(Registry.load([root]).backbone("small"))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    captures = backbone.acts(images, ["blocks.1"])
    shared = Images(backbone, "d", list("abcd"), np.zeros(4, np.int64), {}, 0, captures)
    view = shared.view("blocks.1", ("cls", "patches"))
    sae = random_sae(0)
    direct = SaeBatch(view, sae, 2**20)
    # the identity on the SAE's codes leaves what the SAE alone would splice
    above = SaeBatch(view.above(sae, "sae:small/a/codes", 2**20), Identity(48), 2**20)
    torch.testing.assert_close(
        above.spliced_output().embedding_bd,
        direct.spliced_output().embedding_bd,
        rtol=1e-5,
        atol=1e-6,
    )
    assert torch.equal(above.clean_output.embedding_bd, direct.clean_output.embedding_bd)
    transcoder = replace(sae, transcoder=True)
    above = SaeBatch(view.above(transcoder, "sae:small/a/codes", 2**20), Identity(48), 2**20)
    with pytest.raises(Mismatch, match="codes of a transcoder"):
        above.spliced_output()


def test_config_keywords() -> None:
    assert api.config_of(backbone="a", out=Path("o")) == RunConfig(backbone=("a",), out="o")
