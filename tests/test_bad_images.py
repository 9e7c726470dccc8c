"""Images that do not decode: fatal, or left out, counted and named; the rest is measured right."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL.Image import Image

import saebench
from saebench import evaluation, units
from saebench.data import open_dataset
from saebench.data.shapes import Shapes
from saebench.errors import UsageError
from saebench.evaluation import consecutive
from saebench.formats import read_sae
from saebench.registry import Registry
from saebench.train.config import TrainConfig
from saebench.train.run import train
from tests.small import activations, setting

N = 96
BAD = (0, 7, 8, 63, 90)  # places in the evaluation order
BAD_TRAIN = (3,)
TASKS = ("reconstruction", "sparsity", "dead_neurons", "loss_substitution")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return setting(tmp_path_factory.mktemp("content"))


@pytest.fixture
def damaged(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Some images of `shapes` cannot be read; the ids of those of the test split, in order."""
    shapes = open_dataset(Registry.load([root]).dataset("shapes"))
    bad = {
        (split, int(shapes.manifest(split).order(N)[place]))
        for split, places in (("test", BAD), ("train", BAD_TRAIN))
        for place in places
    }
    honest = Shapes._decode

    def decode(self: Shapes, split: str, index: int) -> Image:
        if (split, index) in bad:
            raise OSError("image file is truncated")
        return honest(self, split, index)

    monkeypatch.setattr(Shapes, "_decode", decode)
    manifest = shapes.manifest("test")
    return [manifest.ids[int(manifest.order(N)[place])] for place in BAD]


def run(root: Path, out: Path, **options: Any) -> pd.DataFrame:
    defaults = {"backbone": "small", "sae": ("small/a", "zero"), "limit": N, "train_limit": 64}
    defaults |= {"task": TASKS}
    return saebench.run(registry=[root], out=out, **{**defaults, **options})


def default(rows: pd.DataFrame, sae: str, metric: str) -> pd.Series:
    whose = rows.query("sae == @sae and tokens == 'all' and metric == @metric")
    chosen = whose.query("group == 'all' and variant == ''")
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_a_bad_image_is_fatal_unless_said_otherwise(
    root: Path, damaged: list[str], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="units failed"):
        assert run(root, tmp_path / "out").empty
    record = next((tmp_path / "out/_errors").glob("*.json")).read_text()
    assert "truncated" in record
    assert "--bad-images skip" in record


def test_what_is_left_is_measured_as_if_the_rest_had_never_been(
    root: Path, damaged: list[str], tmp_path: Path
) -> None:
    rows = run(root, tmp_path, bad_images="skip", task=())  # what runs by default
    x_btd = np.delete(activations_of(root), BAD, axis=0).astype(np.float64)
    x_nd = x_btd.reshape(-1, x_btd.shape[-1])
    # The control `zero` gives nothing back: its mse and fvu are sums over x alone.
    energy = (x_nd**2).sum()
    assert default(rows, "zero", "mse")["value"] == pytest.approx(energy / x_nd.size, rel=1e-5)
    centred = ((x_nd - x_nd.mean(axis=0)) ** 2).sum()
    assert default(rows, "zero", "fvu")["value"] == pytest.approx(energy / centred, rel=1e-5)
    assert set(rows.query("variant == ''")["n_images"]) == {N - len(BAD)}
    assert set(rows["n_skipped"]) == {len(BAD)}
    assert default(rows, "small/a", "dead_fraction")["n"] == len(x_nd)


def activations_of(root: Path) -> np.ndarray:
    """Of every image, also of those that are bad: read past the damage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shapes, "_decode", _undamaged)
        return activations(root, "shapes", "test", N)


_undamaged = Shapes._decode


def test_a_latent_that_fires_late_is_not_dead(
    root: Path, damaged: list[str], tmp_path: Path
) -> None:
    """Places are kept, so a first firing may lie beyond the number of rows that were measured."""
    rows = run(root, tmp_path, bad_images="skip")
    x_btd = np.delete(activations_of(root), BAD, axis=0)
    sae = read_sae(root / "registry/saes/small/a.safetensors")
    import torch

    codes = sae.encode(torch.from_numpy(x_btd.reshape(-1, x_btd.shape[-1]))).dense()
    dead = float((codes.abs().sum(0) == 0).double().mean())
    assert default(rows, "small/a", "dead_fraction")["value"] == pytest.approx(dead)


def test_they_are_counted_once_and_named(root: Path, damaged: list[str], tmp_path: Path) -> None:
    run(root, tmp_path, bad_images="skip", train_limit=32, memory="1KiB")  # several waves
    run(root, tmp_path, bad_images="skip", overwrite="all")
    lines = listed(tmp_path)
    assert sorted(line["id"] for line in lines if line["split"] == "test") == sorted(damaged)
    assert len([line for line in lines if line["split"] == "train"]) == len(BAD_TRAIN)
    assert all("truncated" in line["why"] for line in lines)


def test_segments_and_resuming_do_not_move_a_bit(
    root: Path, damaged: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "SEGMENT", 40)
    monkeypatch.setattr(evaluation, "SEGMENT", 40)
    options = {"bad_images": "skip", "batch_size": 8, "task": "*"}
    whole = run(root, tmp_path / "whole", **options)
    import saebench.runner as runner

    honest, calls = runner.GroupRun._segment, []

    def interrupted(self: Any, segment: int, *args: Any) -> Any:
        calls.append(segment)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(self, segment, *args)

    monkeypatch.setattr(runner.GroupRun, "_segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "cut", **options)
    monkeypatch.setattr(runner.GroupRun, "_segment", honest)
    resumed = run(root, tmp_path / "cut", **options)
    columns = ["unit_id", "group", "metric", "variant", "value", "ci_low", "n", "n_skipped"]
    order = columns[:4]
    pd.testing.assert_frame_equal(
        whole[columns].sort_values(order, ignore_index=True),
        resumed[columns].sort_values(order, ignore_index=True),
    )


def test_leaving_images_out_is_part_of_what_was_measured(root: Path, tmp_path: Path) -> None:
    strict = run(root, tmp_path, task="reconstruction")
    lenient = run(root, tmp_path, task="reconstruction", bad_images="skip")
    assert not set(strict["unit_id"]) & set(lenient["unit_id"])
    # Nothing was bad, so the numbers are the same.
    assert default(strict, "zero", "mse")["value"] == default(lenient, "zero", "mse")["value"]
    assert set(lenient["n_skipped"]) == {0}


def test_training_leaves_them_out_too(root: Path, damaged: list[str], tmp_path: Path) -> None:
    config = TrainConfig(
        backbone="small",
        registry=(str(root),),
        out=str(tmp_path),
        train_limit=64,
        steps=5,
        batch_rows=64,
        arch=("topk",),
        k=(4,),
        dataset=("shapes",),
        bad_images="skip",
    )
    (trained,) = train(config)
    assert trained.measured is not None
    assert trained.measured.n_rows == (64 - len(BAD_TRAIN)) * 17


def test_what_was_fitted_without_some_images_is_not_taken_once_they_are_back(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shapes, "_decode", without(root, "train", range(0, 64, 2)))
        half = run(root, tmp_path / "half", sae=("mean",), bad_images="skip")
    whole = run(root, tmp_path / "whole", sae=("mean",), bad_images="skip")
    strict = run(root, tmp_path / "strict", sae=("mean",))
    of_half, of_whole, of_strict = (
        default(rows, "mean", "fvu")["value"] for rows in (half, whole, strict)
    )
    assert of_whole == of_strict != of_half


def without(root: Path, split: str, places: Iterable[int]) -> Any:
    """A decoder that fails at these places of a split's order."""
    manifest = open_dataset(Registry.load([root]).dataset("shapes")).manifest(split)
    bad = {int(manifest.order()[place]) for place in places}

    def decode(self: Shapes, which: str, index: int) -> Image:
        if which == split and index in bad:
            raise OSError("image file is truncated")
        return _undamaged(self, which, index)

    return decode


def test_a_fit_sees_the_same_images_whatever_else_is_fitted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random control's sparsity is measured on 256 images, a PCA's covariance on more."""
    monkeypatch.setattr(Shapes, "_decode", without(root, "train", (3, 50, 200, 255)))

    def l0(store: str, *coders: str) -> float:
        monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / store))
        rows = run(
            root,
            tmp_path / store / "out",
            sae=coders,
            task="sparsity",
            bad_images="skip",
            train_limit=320,
        )
        return float(default(rows, "small/relu@random", "l0")["value"])

    assert l0("alone", "small/relu@random") == l0("together", "small/relu@random", "pca-4")
    fits = []
    for store in ("alone", "together"):
        folder = tmp_path / store / "artifacts/sae_l0"
        fits.append({path.parent.name for path in folder.rglob("manifest.json")})
    assert fits[0] == fits[1] != set()


def test_images_of_which_none_decodes_are_no_result(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shapes, "_decode", without(root, "test", range(N)))
    with pytest.warns(UserWarning, match="units failed"):
        assert run(root, tmp_path / "out", bad_images="skip").empty
    record = next((tmp_path / "out/_errors").glob("*.json")).read_text()
    assert f"none of the {N} images could be decoded" in record
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(Shapes, "_decode", without(root, "train", range(64)))
    with pytest.warns(UserWarning, match="units failed"):
        assert run(root, tmp_path / "other", sae=("mean",), bad_images="skip").empty


def test_the_list_has_what_was_met_before_an_interrupt(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "SEGMENT", 40)
    monkeypatch.setattr(evaluation, "SEGMENT", 40)
    monkeypatch.setattr(Shapes, "_decode", without(root, "test", (5, 60)))
    import saebench.runner as runner

    honest = runner.GroupRun._segment

    def interrupted(self: Any, segment: int, *args: Any) -> Any:
        if segment == 1:
            raise KeyboardInterrupt
        return honest(self, segment, *args)

    monkeypatch.setattr(runner.GroupRun, "_segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path, bad_images="skip")
    assert len(listed(tmp_path)) == 1
    monkeypatch.setattr(runner.GroupRun, "_segment", honest)
    rows = run(root, tmp_path, bad_images="skip")
    assert set(rows["n_skipped"]) == {2}
    assert len(listed(tmp_path)) == 2


def listed(out: Path) -> list[dict[str, str]]:
    with (out / "_bad_images/shapes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("places", "parts"),
    [
        ([3], [(0, 1)]),
        ([3, 4, 5], [(0, 3)]),
        ([0, 2, 3, 7], [(0, 1), (1, 3), (3, 4)]),
    ],
)
def test_consecutive_places(places: list[int], parts: list[tuple[int, int]]) -> None:
    assert [(p.start, p.stop) for p in consecutive(np.array(places))] == parts


def test_a_data_root_that_is_not_there(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data-root .*nowhere: there is no such folder"):
        run(root, tmp_path / "out", data_root=tmp_path / "nowhere")


def test_the_environment_names_the_data_root(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBENCH_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"SAEBENCH_DATA = .*nowhere"):
        run(root, tmp_path / "out")
