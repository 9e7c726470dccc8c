"""Probes of a run: fitted once, on the right rows, as artifacts that outlast a kill."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression, RidgeClassifier

import saebench
from saebench.api import config_of, execute
from saebench.backbones import load_backbone
from saebench.data import open_dataset
from saebench.data.loader import batches
from saebench.entries import read_manifest
from saebench.errors import ImageError
from saebench.probe import Probe
from saebench.probing import fits
from saebench.probing.collect import Collector
from saebench.probing.stored import cautions, on_device
from saebench.registry import Registry
from saebench.runner import Watch
from saebench.store import Store
from saebench.tensors import from_bytes

N, SAE = 100, "tiny-vit/topk-k8"
GIVEN: dict[str, Any] = {
    "backbone": "tiny-vit",
    "dataset": "digits",
    "task": "linear_probe",
    "sae": ["identity", SAE],
    "train_limit": N,
    "limit": 20,
}


@dataclass(frozen=True)
class Case:
    """A folder with a store of its own."""

    folder: Path

    def run(self, **more: Any) -> pd.DataFrame:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SAEBENCH_STORE", str(self.folder / "store"))
            return saebench.run(**{**GIVEN, "out": self.folder / "out", **more})

    def artifacts(self, kind: str, **fields: Any) -> Iterator[dict[str, np.ndarray]]:
        """Those of a kind whose fields, or those of their features, are these."""
        for entry in Store(self.folder / "store").entries("artifacts"):
            manifest = read_manifest(entry)
            if entry.parent.name == kind and manifest is not None:
                given = manifest["fields"]
                flat = {**given["features"], **given["sample"], **given}
                if all(flat.get(name) == value for name, value in fields.items()):
                    yield from_bytes((entry / "data.safetensors").read_bytes())

    def artifact(self, kind: str, **fields: Any) -> dict[str, np.ndarray]:
        (found,) = self.artifacts(kind, **fields)
        return found


@pytest.fixture(scope="module", autouse=True)
def _few_fits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fits, "SPARSE", (5, 10))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = Case(tmp_path_factory.mktemp("done"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*failed")
        case.run(shots=[2])
    return case


@pytest.fixture(scope="module")
def cls() -> tuple[np.ndarray, np.ndarray]:
    """[N d] float64, the CLS tokens of the train images by plain forward passes, and labels."""
    registry = Registry.load()
    backbone = load_backbone(registry.buildable("tiny-vit"))
    dataset = open_dataset(registry.dataset("digits"))
    order = dataset.manifest("train").order(N)
    stream = batches(dataset, "train", order, backbone.transform, N, 0)
    ((_, images),) = stream
    site = backbone.spec.site
    acts_btd = backbone.acts(images, [site])[site].acts_btd
    part = backbone.spec.sites[site].kinds["cls"]
    return acts_btd[:, part].squeeze(1).double().numpy(), dataset.manifest("train").labels[order]


HELD = np.arange(N) % 5 == 4


def scaled(x_nd: np.ndarray) -> np.ndarray:
    centred = x_nd - x_nd.mean(axis=0)
    return centred / np.sqrt((centred**2).mean())


def objective(x_nd: np.ndarray, y_n: np.ndarray, found: dict[str, np.ndarray]) -> float:
    """Mean cross-entropy and penalty of a stored probe, over features as they are."""
    scale = np.sqrt(((x_nd - x_nd.mean(axis=0)) ** 2).mean())
    logits = torch.from_numpy(x_nd @ found["W_dc"] + found["b_c"])
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y_n))
    return float(loss) + float(found["penalty"]) / 2 * ((found["W_dc"] * scale) ** 2).sum()


def least(x_nd: np.ndarray, y_n: np.ndarray, penalty: float) -> float:
    """The same of scikit-learn's optimum."""
    model = LogisticRegression(C=1 / (penalty * len(y_n)), tol=1e-8, max_iter=20_000)
    rows = scaled(x_nd)
    model.fit(rows, y_n)
    logits = torch.from_numpy(rows @ model.coef_.T + model.intercept_)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y_n))
    return float(loss) + penalty / 2 * (model.coef_**2).sum()


def test_a_probe_is_at_the_optimum_of_all_train_rows(
    done: Case, cls: tuple[np.ndarray, np.ndarray]
) -> None:
    found = done.artifact("probe_dense", what="x", refit=True)
    best = least(*cls, float(found["penalty"]))
    assert best * (1 - 1e-5) <= objective(*cls, found) <= best * (1 + 2e-4)
    assert np.isfinite(found["loss_validation"])


def test_latents_are_ranked_without_the_rows_that_are_held(
    done: Case, cls: tuple[np.ndarray, np.ndarray]
) -> None:
    """The codes of the identity are x itself: its latents are the coordinates."""
    x_nd, y_n = cls
    f_d, _ = f_classif(x_nd[~HELD], y_n[~HELD])
    whole = done.artifacts("probe_sparse", k=5, refit=True)
    ranked = np.argsort(-f_d, kind="stable")[:5]
    (found,) = [a for a in whole if np.array_equal(a["latents_k"], ranked)]
    best = least(x_nd[:, ranked], y_n, float(found["penalty"]))
    assert objective(x_nd[:, ranked], y_n, found) <= best * (1 + 2e-4)


def test_a_few_shot_probe_is_fitted_without_the_rows_that_are_held(done: Case) -> None:
    rows = done.run(shots=[2])
    few = rows.query("shots == 2")
    assert set(rows["n_train"].dropna()) == {N, 20}
    assert set(few["n_train"].dropna()) == {20}
    assert few["variant"].str.contains("shots=2").all()


def test_the_identity_loses_nothing(done: Case) -> None:
    rows = done.run(shots=[2])
    own = rows.query("sae == 'identity' and metric.str.contains('(?:delta|increase)_[fr]')")
    assert len(own) == 16
    assert set(own["value"]) == {0}
    assert set(own["converged"]) == {True}


def stop(*args: Any, **options: Any) -> NoReturn:
    raise AssertionError("this was done before")


def test_nothing_is_done_twice(done: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    before = done.run(shots=[2])
    monkeypatch.setattr(Collector, "collect", stop)
    monkeypatch.setattr(fits, "fit_probe", stop)
    again = done.run(shots=[2], overwrite="all")
    columns = ["metric", "variant", "value", "ci_low", "penalty", "note"]
    pd.testing.assert_frame_equal(before.loc[:, columns], again.loc[:, columns])


class Counting(Watch):
    def __init__(self) -> None:
        self.train, self.said = 0, list[str]()

    def train_images(self, n: int) -> None:
        self.train += n

    def collected(self, n: int) -> None:
        self.train += n

    def say(self, text: str) -> None:
        self.said.append(text)


def test_what_a_kill_left_is_gone_on_with(
    tmp_path: Path, done: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, fit_tree, fit_probe = Case(tmp_path), fits.fit_tree, fits.fit_probe

    def killed(*args: Any, **options: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(fits, "fit_tree", killed)
    with pytest.raises(KeyboardInterrupt):
        case.run(sae=SAE)
    assert len(list(case.artifacts("probe_sparse"))) == 2
    monkeypatch.setattr(fits, "fit_tree", fit_tree)
    monkeypatch.setattr(fits, "fit_probe", stop)
    watch = Counting()
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    config = config_of(**{**GIVEN, "sae": SAE, "out": tmp_path / "out"})
    found = execute(config, watch)
    assert not found.failed
    assert watch.train == 0
    monkeypatch.setattr(fits, "fit_probe", fit_probe)
    whole, columns = done.run(sae=SAE), ["metric", "variant", "value"]
    pd.testing.assert_frame_equal(found.rows.loc[:, columns], whole.loc[:, columns])


def test_an_error_is_that_of_its_own_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_single = fits.fit_single

    def fails(offsets: Any, indices: Any, values: Any, d: int, *rest: Any) -> Any:
        if len(values) < 0.9 * (len(offsets) - 1) * d:
            raise ValueError("no single latent")
        return fit_single(offsets, indices, values, d, *rest)

    monkeypatch.setattr(fits, "fit_single", fails)
    monkeypatch.setattr(fits, "SPARSE", ())
    with pytest.warns(UserWarning, match=f"1 units failed.*{SAE}"):
        rows = Case(tmp_path).run(task=["linear_probe", "dead_neurons"])
    assert set(zip(rows["sae"], rows["task"], strict=True)) == {
        ("identity", "linear_probe"),
        ("identity", "dead_neurons"),
        (SAE, "dead_neurons"),
    }


def test_a_feature_that_a_coder_does_not_cover_is_refused(done: Case) -> None:
    with pytest.warns(UserWarning, match="reads cls, and 'identity' covers grid"):
        rows = done.run(backbone="tiny-resnet", sae="identity", option="linear_probe.feature=cls")
    assert rows.empty


def test_the_identity_loses_nothing_whatever_was_fitted_before(
    done: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe on x of other batches is there, which no refitted one may be compared with."""
    monkeypatch.setattr(fits, "SPARSE", ())
    shutil.copytree(done.folder / "store", tmp_path / "store")
    case = Case(tmp_path)
    before = len(list(case.artifacts("probe_dense", what="x", refit=True)))
    rows = case.run(sae="identity", batch_size=7)
    of_x = list(case.artifacts("probe_dense", what="x", refit=True))
    assert (before, len(of_x)) == (1, 2)
    deltas = rows[rows["metric"].str.match("probe_(delta|loss_increase)_(frozen|refit)")]
    assert len(deltas) >= 8
    assert set(deltas["value"]) == {0}


def test_images_that_do_not_decode_make_other_artifacts(
    done: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry.load()
    dataset = open_dataset(registry.dataset("digits"))
    bad, decode = int(dataset.manifest("train").order(N)[3]), type(dataset)._decode

    def fails(self: Any, split: str, index: int) -> Any:
        if (split, index) == ("train", bad):
            raise ImageError("not an image")
        return decode(self, split, index)

    monkeypatch.setattr(type(dataset), "_decode", fails)
    monkeypatch.setattr(fits, "SPARSE", ())
    case = Case(tmp_path)
    rows = case.run(sae="identity", bad_images="skip")
    assert set(rows["n_train"].dropna()) == {N - 1}
    assert list(case.artifacts("probe_dense", left_out=None)) == []
    found = next(case.artifacts("probe_dense", what="x"))
    whole = done.artifact("probe_dense", what="x", refit=True)
    assert not np.array_equal(found["W_dc"], whole["W_dc"])


def test_ridge_and_a_label_level(tmp_path: Path) -> None:
    options = [f"linear_probe.{said}" for said in ("solver=ridge", "label=family")]
    rows = Case(tmp_path).run(dataset="shapes", sae="identity", option=options)
    assert set(rows["variant"].str.contains("label=family")) == {True}
    assert set(rows["solver"].dropna()) == {"ridge"}
    assert rows.set_index("metric").loc["probe_accuracy_x", "value"] > 1 / 6  # families


def test_a_ridge_probe_is_that_of_scikit_learn(
    done: Case, cls: tuple[np.ndarray, np.ndarray]
) -> None:
    x_nd, y_n = cls
    done.run(sae="identity", option="linear_probe.solver=ridge")
    found = done.artifact("probe_dense", what="x", solver="ridge")
    model = RidgeClassifier(alpha=float(found["penalty"]) * N, tol=1e-10).fit(scaled(x_nd), y_n)
    theirs = model.decision_function(scaled(x_nd))
    mine = x_nd @ found["W_dc"] + found["b_c"]
    np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_a_large_dictionary_is_read_by_its_best_latents(
    done: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "BEST", 10)
    monkeypatch.setattr(fits, "LARGEST", 100)
    case = Case(tmp_path)
    rows = case.run(sae="identity").set_index("metric")
    assert rows.loc["probe_accuracy_codes", "variant"] == "latents=10"
    assert rows.loc["probe_accuracy_x", "variant"] == ""
    found = case.artifact("probe_codes")
    assert found["W_dc"].shape == (10, 10)
    ten = next(a for a in case.artifacts("probe_sparse", k=10))
    assert set(found["latents_k"]) == set(ten["latents_k"])
    assert (np.diff(found["latents_k"]) > 0).all()
    assert float(found["loss_train"]) == pytest.approx(float(ten["loss_train"]), rel=1e-3)


def test_features_that_have_no_room_are_streamed(
    done: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "IN_MEMORY", 0)
    monkeypatch.setattr("saebench.probing.train_codes.IN_MEMORY", 0)
    monkeypatch.setattr(fits, "DenseRows", stop)
    monkeypatch.setattr("saebench.probing.train_codes.CsrRows.of", stop)
    case = Case(tmp_path)
    monkeypatch.setattr(fits, "SPARSE", ())
    case.run(sae=SAE)
    for kind in ("probe_dense", "probe_codes"):
        for mine in case.artifacts(kind, refit=True):
            theirs = [float(a["loss_train"]) for a in done.artifacts(kind, refit=True)]
            assert np.isclose(float(mine["loss_train"]), theirs, rtol=1e-3).any()


def test_a_gpu_without_room_leaves_a_fit_to_the_cpu() -> None:
    tried: list[str] = []

    def fit(device: torch.device) -> str:
        tried.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "fitted"

    assert on_device(torch.device("cuda"), fit) == "fitted"
    assert tried == ["cuda", "cpu"]
    with pytest.raises(ValueError, match="no such"):
        on_device(torch.device("cuda"), lambda device: int("no such"))
    tried.clear()
    on_device(torch.device("mps"), fit)
    assert tried == ["cpu"]


def test_cautions() -> None:
    W_dc, b_c = torch.zeros(2, 3), torch.zeros(3)
    sound = Probe(W_dc, b_c, 0.1, 1.0, 0.5, 1.0, 0.5, True, 0.0, 9, 0)
    assert cautions(fits.arrays_of(sound)) == []
    poor = Probe(W_dc, b_c, 1.0, 1.0, 0.5, np.nan, np.nan, False, 0.02, 9, 2)
    said = "; ".join(cautions(fits.arrays_of(poor)))
    assert "did not converge: up to 0.02 nat" in said
    assert "2 of 3 classes have no train image" in said
    assert "too few train images" in said
