"""Linear probes whose numbers are known: from a slow plain script, and from what must come out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binom, ortho_group
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import saebench
from saebench.data import Dataset, Manifest
from saebench.probe import DenseRows, Probe, fit_probe
from saebench.probing import fits
from saebench.task import variant_string
from tests.slow_linear_probe import Slow
from tests.slow_probes import cross_entropy, log_softmax, logits_of, to_optimum

KS = (1, 5, 20, 100)
NAMES = ("tiny-clip", "tiny-bioclip", "tiny-dinov2", "tiny-vit", "tiny-resnet")
FEATURE = dict.fromkeys(NAMES, "cls") | {"tiny-resnet": "mean"}  # the default of each

SMALL = (
    Slow("tiny-vit/topk-k8", "shapes", 200, 200, "cls", "genus", ks=(5,), levels=("family",)),
    Slow("tiny-resnet/topk-k8", "shapes", 200, 200, "mean", "family", ks=(20,)),
)
TESTED = (
    pytest.param(SMALL[0], marks=pytest.mark.slow),
    replace(SMALL[1], label="genus", levels=("family",)),
)
LARGE = [
    *(
        Slow(f"{name}/topk-k8", "shapes", 600, 300, FEATURE[name], "", KS, ("genus", "family"))
        for name in NAMES
    ),
    Slow("tiny-vit/topk-k8", "digits", 600, 300, "cls+mean", ks=KS),
    Slow("tiny-vit/topk-k8", "shapes", 400, 300, "embedding", "genus", ks=(20,)),
    Slow("tiny-clip/topk-k8", "shapes", 400, 300, "embedding", "genus", ks=(20,)),
    Slow("tiny-resnet/topk-k8", "shapes", 400, 300, "embedding", "genus", ks=(20,)),
]
LOSS = 2e-3  # of a loss on test images: what optima to 1e-4 differ by
FLAT = 1e-2  # of one or two latents, whose weights can grow a long way for nothing
IMAGES = 3  # test images that they may call otherwise
TIES = 0.05  # of them where one latent is read: it is silent on most, and classes are as good


Rows = list[dict[str, Any]]


def run_of(slow: Slow, out: Path, **more: Any) -> Rows:
    default = slow.feature == FEATURE[slow.sae.split("/")[0]]
    options = [] if default else [f"linear_probe.feature={slow.feature}"]
    options += [f"linear_probe.label={slow.label}"] if slow.label else []
    found = saebench.run(
        **{
            "backbone": slow.sae.split("/")[0],
            "sae": [slow.sae],
            "task": "linear_probe",
            "dataset": slow.dataset,
            "limit": slow.n_test,
            "train_limit": slow.n_train,
            "option": options,
            "out": out,
            **more,
        }
    )
    return [dict(zip(found.columns, row, strict=True)) for row in found.itertuples(index=False)]


def named(variant: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in variant.split(";") if pair)


def column_of(rows: Rows, name: str) -> dict[tuple[str, str], Any]:
    """(metric, variant) -> a column of the row; the variant without what the run was asked for."""
    found = {}
    for row in rows:
        kept = {k: v for k, v in named(row["variant"]).items() if k in ("level", "pooling")}
        key = (row["metric"], variant_string(kept))
        assert key not in found
        found[key] = row[name]
    return found


def compared(slow: Slow, rows: Rows) -> None:
    penalty = column_of(rows, "penalty")
    expected = slow.rows({key: value for key, value in penalty.items() if "_accuracy_" in key[0]})
    found = column_of(rows, "value")
    assert set(expected) <= set(found)
    for key, value in expected.items():
        few = re.search("_k[12](_|$)", key[0])
        twice = 2 if "increase" in key[0] or "delta" in key[0] or "macro" in key[0] else 1
        if "loss" in key[0]:
            error = (FLAT if few else LOSS) * max(1, value) * twice
        else:
            error = (TIES if few else IMAGES / slow.n_test) * twice + 1e-9
        assert found[key] == pytest.approx(value, abs=error), key
    baseline = column_of(rows, "baseline")
    for (metric, variant), value in baseline.items():
        k = re.search(r"_k(\d+)", metric)
        asked = k is None or int(k[1]) in slow.ks
        if asked and ("delta" in metric or "increase" in metric):
            of_x = "probe_loss_x" if "increase" in metric else "probe_accuracy_x"
            of_x += "".join(end for end in ("_top5", "_macro") if metric.endswith(end))
            level = ";".join(part for part in variant.split(";") if part.startswith("level"))
            assert value == found[of_x, level], (metric, variant)


@pytest.mark.parametrize("slow", TESTED, ids=lambda slow: slow.sae)
def test_rows_are_those_of_hooks_and_scikit_learn(
    slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "SPARSE", slow.ks)  # no others are compared
    compared(slow, run_of(slow, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("slow", LARGE, ids=lambda slow: f"{slow.sae} {slow.feature}")
def test_all_rows_of_larger_samples_are_too(slow: Slow, tmp_path: Path) -> None:
    rows = run_of(slow, tmp_path)
    compared(slow, rows)
    assert column_of(rows, "value")["probe_r_1d", ""] == pytest.approx(slow.r_1d(), abs=2e-3)


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Identity and zero, of few images."""
    few = replace(SMALL[1], n_train=96, n_test=96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fits, "SPARSE", ())
        return run_of(few, tmp_path_factory.mktemp("controls"), sae=["identity", "zero"])


def test_identity_loses_nothing(controls: Rows) -> None:
    differences = [
        row
        for row in controls
        if row["sae"] == "identity" and re.search("(delta|increase)_(frozen|refit)", row["metric"])
    ]
    assert len(differences) == 8  # three accuracies and a loss, frozen and refitted
    for row in differences:
        assert (row["value"], row["ci_low"], row["ci_high"]) == (0.0, 0.0, 0.0)
        assert row["baseline"] > 0


def test_zero_is_at_chance(controls: Rows) -> None:
    value = {row["metric"]: row["value"] for row in controls if row["sae"] == "zero"}
    for who in ("frozen", "refit"):  # one class for all images
        assert value[f"probe_accuracy_xhat_{who}_macro"] == pytest.approx(1 / 6, abs=1e-12)
        assert value[f"probe_accuracy_xhat_{who}"] == pytest.approx(1 / 6, abs=0.02)
    assert value["probe_loss_xhat_refit"] == pytest.approx(np.log(6), abs=0.01)
    assert value["probe_accuracy_x"] > 0.4


def test_labels_at_random_leave_nothing_to_be_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe that sees anything of the test labels, by a ranking or a penalty, does better."""
    honest, known = Dataset.manifest, {}

    def shuffled(self: Dataset, split: str) -> Manifest:
        if split not in known:
            manifest = honest(self, split)
            order = np.random.default_rng(len(known)).permutation(len(manifest))
            levels = {name: values[order] for name, values in manifest.levels.items()}
            known[split] = replace(manifest, labels=manifest.labels[order], levels=levels)
        return known[split]

    monkeypatch.setattr(Dataset, "manifest", shuffled)
    monkeypatch.setattr(fits, "SPARSE", (1, 10, 100))
    n, classes = 480, {"": 48, "genus": 12, "family": 6}
    slow = Slow("tiny-resnet/topk-k8", "shapes", 240, n, "mean")
    rows = run_of(slow, tmp_path, shots=[1])
    rows = [row for row in rows if not re.search("_k(2|5|20|50)(_|$)", row["metric"])]
    assert set(known) >= {"train", "test"}
    accuracies = [row for row in rows if "_accuracy_" in row["metric"]]
    assert {"codes", "k1", "k100", "frozen", "refit", "tree", "macro"} <= {
        part for row in accuracies for part in row["metric"].split("_")
    }
    # Full and few-shot, three levels, two poolings.
    assert len({row["variant"] for row in accuracies}) >= 8
    for row in accuracies:
        top = 5 if row["metric"].endswith("_top5") else 1
        chance = top / classes[named(row["variant"]).get("level", "")]
        low, high = binom.ppf([1e-6, 1 - 1e-6], n, chance) / n
        assert low - 0.005 <= row["value"] <= high + 0.005, (row["metric"], row["variant"])
    for row in rows:
        if re.search("_loss_(x|codes|k)", row["metric"]):
            level = named(row["variant"]).get("level", "")
            assert row["value"] > np.log(classes[level]) - 0.03, (row["metric"], row["variant"])
    gains = [row["value"] for row in rows if row["metric"] == "probe_r_1d"]
    assert len(gains) == 2
    assert max(gains) < 0.01


# The solver, on features


def long_tailed() -> tuple[np.ndarray, np.ndarray]:
    """200 classes, the k-th with about 300/k rows, the rarest with 2: a common mean, few axes."""
    random = np.random.default_rng(0)
    sizes = np.maximum(2, 300 // np.arange(1, 201))
    y_n = random.permutation(np.repeat(np.arange(200), sizes))
    axes_d = np.geomspace(3, 0.1, 16)
    x_nd = (random.normal(size=(200, 16))[y_n] + random.normal(size=(len(y_n), 16))) * axes_d + 5
    return x_nd, y_n


def features(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "long-tailed":
        return long_tailed()
    if name == "digits":
        return load_digits(return_X_y=True)  # type: ignore[return-value]
    train, _ = SMALL[0].features
    return train.x, SMALL[0].train.labels


def fitted(x_nd: np.ndarray, y_n: np.ndarray, held_n: np.ndarray) -> Probe:
    rows = DenseRows.of(torch.from_numpy(x_nd).float(), torch.from_numpy(y_n).long())
    return fit_probe(rows, torch.from_numpy(held_n), int(y_n.max()) + 1)


@pytest.mark.parametrize("name", ["long-tailed", "digits", "shapes"])
def test_a_probe_is_scikit_learns_at_its_optimum(name: str) -> None:
    x_nd, y_n = features(name)
    test_n = np.arange(len(y_n)) % 4 == 1
    if name == "long-tailed":  # the rarest classes are in both
        test_n = pd.Series(y_n).groupby(y_n).cumcount().to_numpy() % 4 == 1
    x, y, x_test, y_test = x_nd[~test_n], y_n[~test_n], x_nd[test_n], y_n[test_n]
    found = fitted(x, y, np.arange(len(y)) % 5 == 4)
    assert found.converged
    mean, scale = x.mean(0), float(np.sqrt(((x - x.mean(0)) ** 2).mean()))
    model = LogisticRegression(max_iter=20_000)
    to_optimum(model, (x - mean) / scale, y, found.penalty)
    W_dc, b_c = found.W_dc.numpy(), found.b_c.numpy()

    def loss(logits_nc: np.ndarray, W_dc: np.ndarray) -> float:
        return cross_entropy(logits_nc, y) + found.penalty / 2 * float((W_dc**2).sum())

    least = loss(logits_of(model, (x - mean) / scale), model.coef_)
    assert 0 <= loss(x @ W_dc + b_c, W_dc * scale) - least + 1e-9 <= 1e-4 * least
    theirs, ours = logits_of(model, (x_test - mean) / scale), x_test @ W_dc + b_c
    assert cross_entropy(ours, y_test) == pytest.approx(cross_entropy(theirs, y_test), rel=LOSS)
    differ = (ours.argmax(1) == y_test).sum() - (theirs.argmax(1) == y_test).sum()
    assert abs(differ) <= IMAGES
    assert np.abs(np.exp(log_softmax(ours)) - np.exp(log_softmax(theirs))).max() < 0.1


def test_rotated_features_are_probed_alike() -> None:
    slow = SMALL[0]
    (train, test), y, y_test = slow.features, slow.train.labels, slow.test.labels
    turn_dd = ortho_group.rvs(train.x.shape[1], random_state=0)
    probes = [fitted(x_nd, y, slow.held_n) for x_nd in (train.x, train.x @ turn_dd)]
    assert probes[0].penalty == probes[1].penalty
    losses = [
        cross_entropy(x_nd @ probe.W_dc.numpy() + probe.b_c.numpy(), y_test)
        for x_nd, probe in zip((test.x, test.x @ turn_dd), probes, strict=True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=LOSS)
    assert probes[0].loss_validation == pytest.approx(probes[1].loss_validation, rel=LOSS)
    assert probes[0].loss_train == pytest.approx(probes[1].loss_train, rel=LOSS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_controls_stand_in_their_order(name: str, tmp_path: Path) -> None:
    slow = Slow(f"{name}/topk-k8", "shapes", 1024, 512, FEATURE[name])
    saes, shuffled = [f"{name}/topk-k{k}" for k in (4, 8, 16)], f"{slow.sae}@shuffled-decoder"
    rows = run_of(slow, tmp_path, sae=[*saes, "identity", "zero", shuffled])
    row = {(one["metric"], one["sae"]): one for one in rows if not one["variant"]}

    def value(metric: str, sae: str) -> float:
        return row[metric, sae]["value"]

    for measure in ("", "_top5", "_macro"):
        delta = f"probe_delta_frozen{measure}"
        assert value(delta, "identity") == 0
        for sae in saes:
            assert row[delta, sae]["ci_low"] <= 0
            assert value(delta, sae) >= value(delta, shuffled), (measure, sae)
    increase = "probe_loss_increase_frozen"
    assert value(increase, "identity") == 0
    for sae in saes:
        # What a reconstruction leaves out may be noise to a probe of few images.
        assert -0.05 < value(increase, sae) < value(increase, shuffled)
    assert len({value("probe_accuracy_x", sae) for sae in (*saes, "identity", "zero")}) == 1
    assert value("probe_accuracy_x", "zero") > 5 / 48
    for who in ("frozen", "refit"):
        accuracy = f"probe_accuracy_xhat_{who}"
        assert value(f"{accuracy}_macro", "zero") == pytest.approx(1 / 48, abs=1e-12)
        assert value(accuracy, "zero") == pytest.approx(1 / 48, abs=0.01)
        assert value(f"{accuracy}_top5", "zero") == pytest.approx(5 / 48, abs=0.02)
    assert value("probe_loss_xhat_refit", "zero") == pytest.approx(np.log(48), abs=0.01)
