"""The task `linear_probe` with probes of random weights: scikit-learn's scores of dense codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, recall_score, top_k_accuracy_score
from torch import Tensor

from saebench.controls import Identity
from saebench.metrics import poisson_weights
from saebench.probe.single import SingleLatents
from saebench.probing.predicting import SingleCodes
from saebench.probing.probes import Probes
from saebench.results.schema import BY_NAME, VARIANT_COLUMNS
from saebench.rows import check_value
from saebench.task import Measurement
from tests.measure import context, finished, local_batches, measure, measured, task_class
from tests.random_probes import (
    CODER,
    GENUS,
    IDS,
    KINDS,
    LABELS,
    SINGLE,
    C,
    D,
    N,
    X,
    fitted,
    logits_of,
    pooled,
    probes,
)

Row = dict[tuple[str, str], Measurement]
PRESENT = np.unique(LABELS)


def rows_of(some: Probes, coder: Any = CODER, **more: Any) -> Row:
    """(metric, variant) -> row; of batches of 32 images unless `batch` says otherwise."""
    given = {"kinds": KINDS, "labels": LABELS, "batch": 32, **more}
    found = measure("linear_probe", X, coder, probes=some, **given)
    return {(metric, variant): row for (metric, _, variant), row in found.items()}


def softmax(logits_nc: np.ndarray) -> np.ndarray:
    exp_nc = np.exp(logits_nc - logits_nc.max(1, keepdims=True))
    return exp_nc / exp_nc.sum(1, keepdims=True)


def expected(logits_nc: np.ndarray, at: np.ndarray) -> dict[str, float]:
    """scikit-learn's scores of a sample of the images."""
    y, logits = LABELS[at], logits_nc[at]
    there = np.unique(y)
    return {
        "": accuracy_score(y, logits.argmax(1)),
        "_top5": top_k_accuracy_score(y, logits, k=5, labels=range(C)),
        "_macro": recall_score(y, logits.argmax(1), labels=there, average="macro"),
        "loss": log_loss(y, softmax(logits), labels=range(C)),
    }


# (slot, metric of its accuracy, of its loss, of the differences, variant)
WHO = [
    ("xhat_frozen", "probe_{}_xhat_frozen", "probe_{}_frozen", ""),
    ("xhat_refit", "probe_{}_xhat_refit", "probe_{}_refit", ""),
    ("codes max", "probe_{}_codes", "probe_{}_codes", ""),
    ("codes mean", "probe_{}_codes", "probe_{}_codes", "pooling=mean"),
    *((f"k{k}", f"sparse_probe_{{}}_k{k}", f"sparse_probe_{{}}_k{k}", "") for k in (1, 2, 5)),
]


@pytest.mark.parametrize("chosen", ["mean", "cls+mean"])
def test_values_and_replicates_are_those_of_scikit_learn(chosen: str) -> None:
    some = probes(chosen)
    rows, logits = rows_of(some), logits_of(some, chosen)
    weights_br = poisson_weights("test", IDS)
    for r in (None, 0, 17):
        at = np.arange(N) if r is None else np.repeat(np.arange(N), weights_br[:, r].astype(int))

        def value(metric: str, variant: str = "", r: int | None = r) -> float | None:
            row = rows[metric, variant]
            if r is None:
                return row.value
            assert row.replicates is not None
            return float(row.replicates[r])

        of_x = expected(logits["x"], at)
        for slot, own, difference, variant in WHO:
            scores = expected(logits[slot], at)
            for what, score in scores.items():
                loss, more = what == "loss", "" if what == "loss" else what
                metric = own.format("loss" if loss else "accuracy") + more
                assert value(metric, variant) == pytest.approx(score, abs=1e-9), metric
                metric = difference.format("loss_increase" if loss else "delta") + more
                assert value(metric, variant) == pytest.approx(score - of_x[what], abs=1e-9), metric
                if r is None:
                    baseline = rows[metric, variant].columns["baseline"]
                    assert baseline == pytest.approx(of_x[what], abs=1e-9)
        for what, score in of_x.items():
            metric = "probe_loss_x" if what == "loss" else f"probe_accuracy_x{what}"
            assert value(metric) == pytest.approx(score, abs=1e-9)


def test_levels_above_the_classes() -> None:
    rows, logits = rows_of(probes()), logits_of(probes(), "mean")
    own = {"x": "x", "xhat_frozen": "xhat_frozen", "codes max": "codes"}
    values: dict[str, tuple[float, float]] = {}
    for slot, who in own.items():
        p_nc = softmax(logits[slot])
        p_nv = np.stack([p_nc[:, value == GENUS].sum(1) for value in range(4)], 1)
        accuracy = accuracy_score(GENUS[LABELS], p_nv.argmax(1))
        loss = log_loss(GENUS[LABELS], p_nv, labels=range(4))
        values[slot] = accuracy, loss
        assert rows[f"probe_accuracy_{who}", "level=genus"].value == pytest.approx(accuracy)
        assert rows[f"probe_loss_{who}", "level=genus"].value == pytest.approx(loss, rel=1e-9)
    row = rows["probe_loss_increase_codes", "level=genus"]
    assert row.value == pytest.approx(values["codes max"][1] - values["x"][1], rel=1e-9)
    assert row.columns["baseline"] == pytest.approx(values["x"][1], rel=1e-9)
    assert ("probe_accuracy_codes", "level=genus;pooling=mean") not in rows


def test_tree() -> None:
    z_ns = pooled("mean", "max")
    guess = np.where(z_ns[:, 4] > 4, 5, np.where(z_ns[:, 9] > 2, 2, 1))
    assert len(np.unique(guess)) == 3
    rows, of_x = rows_of(probes()), expected(logits_of(probes(), "mean")["x"], np.arange(N))
    accuracy = accuracy_score(LABELS, guess)
    macro = recall_score(LABELS, guess, labels=PRESENT, average="macro")
    assert rows["tree_accuracy_codes", ""].value == pytest.approx(accuracy)
    assert rows["tree_accuracy_codes_macro", ""].value == pytest.approx(macro)
    assert rows["tree_delta_codes", ""].value == pytest.approx(accuracy - of_x[""])
    assert rows["tree_delta_codes_macro", ""].value == pytest.approx(macro - of_x["_macro"])


@pytest.mark.parametrize("r", [None, 3])
def test_single_latents(r: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saebench.probing.predicting.IMAGES", 40)
    z_ns, gains = pooled("mean", "max"), []
    weight_b = np.ones(N) if r is None else poisson_weights("test", IDS)[:, r]
    for c in range(C):
        if not weight_b[c == LABELS].any():
            continue
        own = c == LABELS
        j = int(SINGLE.latent_c[c])
        u = float(SINGLE.slope_c[c]) * z_ns[:, j] * (j >= 0) + float(SINGLE.bias_c[c])
        ce = np.log1p(np.exp(np.where(own, -u, u)))
        known = np.where(own, -np.log(0.12), -np.log(0.88))
        gains.append(1 - (weight_b @ ce) / (weight_b @ known))
    row = rows_of(probes())["probe_r_1d", ""]
    assert row.replicates is not None
    value = row.value if r is None else row.replicates[r]
    assert value == pytest.approx(np.mean(gains), rel=1e-9)
    assert row.note == "over the 7 of 8 classes that have images"


def test_what_is_kept_of_single_latents_does_not_grow_with_classes() -> None:
    few, many = (
        SingleLatents(*(part.repeat(times) for part in vars(SINGLE).values())) for times in (1, 999)
    )
    codes = CODER.encode(X.flatten(0, 1))
    sizes = []
    for single in (few, many):
        part = SingleCodes(single)
        part.add(codes[:40])
        part.add(codes[40:])
        sizes.append(sum(array.nbytes for array in part.state().values()))
    assert sizes[0] == sizes[1] <= 4 * len(codes.l0_n()) + 5 * len(codes.values_m)


@pytest.mark.parametrize(("batch", "segments"), [(1, []), (7, [1, 2, 40]), (90, [89])])
def test_nothing_depends_on_batches_and_segments(batch: int, segments: list[int]) -> None:
    how: dict[str, Any] = {"kinds": KINDS, "labels": LABELS, "probes": probes()}
    whole = measured(finished("linear_probe", X, CODER, **how))
    parts = measured(finished("linear_probe", X, CODER, batch=batch, segments=segments, **how))
    assert whole.keys() == parts.keys()
    for key, row in whole.items():
        assert parts[key].n == row.n
        if row.value is None:
            assert parts[key].value is None
            continue
        assert parts[key].value == pytest.approx(row.value, rel=0, abs=1e-12)
        one, other = row.replicates, parts[key].replicates
        assert one is not None
        assert other is not None
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["logistic", "ridge"])
def test_the_identity_differs_by_exactly_nothing(solver: str) -> None:
    """Also where the refitted probe lies elsewhere in memory, as it does out of a store."""
    x = fitted(D, 1)
    odd = torch.empty(x.W_dc.numel() + 1, dtype=torch.float64)[1:].view_as(x.W_dc).copy_(x.W_dc)
    refit = replace(x, W_dc=odd, b_c=x.b_c.clone())
    some = probes(xhat=refit, codes={}, sparse={}, tree=None, single=None)
    rows = rows_of(some, Identity(D), batch=13, options={"solver": solver})
    checked = 0
    for (metric, _), row in rows.items():
        of_xhat = metric.startswith(("probe_delta_", "probe_loss_increase_"))
        if of_xhat and "codes" not in metric and row.value is not None:
            assert row.value == 0, metric
            assert row.replicates is not None
            assert not row.replicates.any(), metric
            checked += 1
    assert checked == (12 if solver == "logistic" else 6)


class Counted:
    """How often a probe reads features that are not codes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n, plain = 0, type(fitted(D, 1)).logits

        def logits(this: Any, what: Any) -> Tensor:
            self.n += isinstance(what, Tensor) and this.latents_k is None
            return plain(this, what)

        monkeypatch.setattr("saebench.probing.probes.Fitted.logits", logits)


def test_x_is_read_once_for_all_coders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where each unit has its probe out of the store by itself; another probe is another."""
    counted = Counted(monkeypatch)
    same, other = probes(codes={}, sparse={}, tree=None, single=None), probes()
    again = replace(same, x=replace(same.x, W_dc=same.x.W_dc.clone()))
    moved = replace(same, x=replace(same.x, b_c=same.x.b_c + 1))
    elsewhere = probes("cls", codes={}, sparse={}, tree=None, single=None)
    batch: Any = next(local_batches(X, CODER, context(X, CODER, kinds=KINDS), N, LABELS))
    counts = []
    for some in (same, again, other, moved, elsewhere):
        task = task_class("linear_probe")()
        task.start(context(X, CODER, kinds=KINDS, probes=some))
        before = counted.n
        task.update(batch)
        counts.append(counted.n - before)
    assert counts == [3, 2, 2, 3, 3]


def test_rows_are_of_declared_metrics_and_known_columns() -> None:
    variant = {"label": "", "shots": 5, "solver": "ridge"}
    found = rows_of(probes(variant={k: v for k, v in variant.items() if v}))
    task = task_class("linear_probe")()
    declared = {metric.name: metric for metric in task.metrics}
    assert {metric for metric, _ in found} == set(declared)
    for (metric, _), row in found.items():
        check_value(task, declared[metric], row)
        assert set(row.columns) <= set(BY_NAME)
        assert set(row.variant) <= set(VARIANT_COLUMNS)
        assert row.variant["shots"] == 5
        assert row.columns["feature"] == "mean"
        assert row.n == N
        assert row.group == "all"


def test_columns_of_a_row_are_its_probe_s() -> None:
    some = probes()
    rows = rows_of(some)
    assert rows["probe_accuracy_xhat_frozen", ""].columns["penalty"] == some.x.columns["penalty"]
    assert rows["probe_delta_refit", ""].columns["penalty"] == 0.01
    assert rows["sparse_probe_loss_k5", ""].columns["penalty"] == pytest.approx(1e-7)
    assert rows["probe_accuracy_codes", ""].columns["pooling"] == "max"
    assert rows["probe_accuracy_codes", "pooling=mean"].variant["pooling"] == "mean"
    assert "pooling" not in rows["probe_accuracy_x", ""].columns
    many = rows_of(probes(looked={"tree": 50, "single": 60}))
    assert many["tree_accuracy_codes", ""].columns["n_train"] == 50
    assert many["probe_r_1d", ""].columns["n_train"] == 60
    assert many["probe_accuracy_codes", ""].columns["n_train"] == 70
    assert rows["tree_delta_codes", ""].columns["n_train"] == 70
    macro = rows["probe_accuracy_x_macro", ""]
    assert macro.note == "over the 7 of 8 classes that have images"
    assert rows["probe_accuracy_x", ""].note == ""


def test_a_dictionary_too_large_is_a_variant() -> None:
    s = pooled("mean", "max").shape[1]
    limited = fitted(4, 9, [3, 0, 5, 11], variant={"latents": 4}, note="not yet converged")
    rows = rows_of(probes(codes={"max": limited, "mean": fitted(s, 4)}))
    row = rows["probe_accuracy_codes", "latents=4"]
    assert row.note == "not yet converged"
    z_nk = pooled("mean", "max")[:, [3, 0, 5, 11]]
    guess = (z_nk @ limited.W_dc.numpy() + limited.b_c.numpy()).argmax(1)
    assert row.value == pytest.approx(accuracy_score(LABELS, guess))
    assert ("probe_accuracy_codes", "") not in rows
