"""The task `loss_substitution` against closed forms, NumPy twins and published tables.

A small stand-in takes the place of what comes after the site; tests/test_task_loss_substitution_
hooks.py has real backbones.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.backbones import Output
from saebench.controls import Identity, Mean, Zero
from saebench.metrics import poisson_weights
from saebench.metrics.substitution import (
    TERMS,
    Prediction,
    image_terms,
    loss_recovered,
    predicted,
    rank,
)
from saebench.readouts import ZeroShot
from saebench.rows import interval
from tests.substitution import (
    LABELS,
    MEAN,
    W_DC,
    D,
    Moved,
    N,
    T,
    X,
    drawn,
    reads_cls,
    rest,
    rows_of,
)
from tests.test_task_reconstruction import topk_sae

# --- a NumPy twin --------------------------------------------------------------------------------


def softmax_losses(logits_bc: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Image by image, through a log-sum-exp of its own."""
    found = []
    for row, label in zip(logits_bc, labels, strict=True):
        top = row.max()
        found.append(top + math.log(sum(math.exp(v - top) for v in row)) - row[label])
    return np.array(found)


def twin(outputs: dict[str, Output], labels: np.ndarray) -> dict[str, float]:
    """The measures as they are written."""
    logits = {k: v.logits_bc.double().numpy() for k, v in outputs.items()}  # type: ignore[union-attr]
    vectors = {k: v.embedding_bd.double().numpy() for k, v in outputs.items()}
    loss = {k: softmax_losses(v, labels) for k, v in logits.items()}
    found = {f"loss_{k}": v.mean() for k, v in loss.items()}
    found["loss_increase"] = found["loss_spliced"] - found["loss_clean"]
    for metric, other in (("loss_recovered", "zero"), ("loss_recovered_mean", "mean")):
        gap = found[f"loss_{other}"] - found["loss_clean"]
        found[metric] = (found[f"loss_{other}"] - found["loss_spliced"]) / gap
    p = np.exp(logits["clean"]) / np.exp(logits["clean"]).sum(1, keepdims=True)
    e = vectors["clean"]
    for k, values_bc in logits.items():
        order = np.argsort(-values_bc, axis=1)
        found[f"accuracy_{k}"] = (order[:, 0] == labels).mean()
        found[f"accuracy_top5_{k}"] = (order[:, :5] == labels[:, None]).any(1).mean()
        if k != "clean":
            q = np.exp(values_bc) / np.exp(values_bc).sum(1, keepdims=True)
            found[f"agreement_{k}"] = (order[:, 0] == logits["clean"].argmax(1)).mean()
            found[f"kl_{k}"] = (p * np.log(p / q)).sum(1).mean()
            cosines = [
                a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                for a, b in zip(vectors[k], e, strict=True)
                if np.linalg.norm(a) > 0
            ]
            found[f"embedding_cosine_{k}"] = np.mean(cosines) if cosines else np.nan
            found[f"embedding_nmse_{k}"] = ((vectors[k] - e) ** 2).sum() / (
                (e - e.mean(0)) ** 2
            ).sum()
    return found


def outputs_of(coder: Any, x_btd: Tensor = X) -> dict[str, Output]:
    recon_btd = coder.decode(coder.encode(x_btd.flatten(0, 1))).view_as(x_btd)
    other = {"zero": torch.zeros_like(x_btd), "mean": MEAN.expand_as(x_btd)}
    return {k: rest(v) for k, v in {"clean": x_btd, "spliced": recon_btd, **other}.items()}


def test_every_measure_equals_its_numpy_twin() -> None:
    expected = twin(outputs_of(topk_sae()), LABELS)
    rows = rows_of(topk_sae(), batch=7)
    assert {metric for metric, _ in rows} == set(expected)
    for metric, value in expected.items():
        row = rows[metric, ""]
        if np.isnan(value):  # tanh(0) = 0: an embedding of norm 0 has no direction
            assert metric == "embedding_cosine_zero"
            assert (row.value, row.note) == (
                None,
                "every embedding has norm 0, untouched or with other activations",
            )
        else:
            assert row.value == pytest.approx(value, rel=1e-12, abs=1e-14), metric
            assert row.n == N, metric


def test_replicates_are_a_poisson_bootstrap_over_images() -> None:
    sae = topk_sae()
    rows = rows_of(sae, batch=7)
    weights_br = poisson_weights("test", [f"image{i}" for i in range(N)])
    for replicate in (0, 17, 499):
        again = np.repeat(np.arange(N), weights_br[:, replicate].astype(int))
        expected = twin(outputs_of(sae, X[again]), LABELS[again])
        for metric, value in expected.items():
            found = rows[metric, ""].replicates
            if not np.isnan(value):
                assert found is not None
                assert found[replicate] == pytest.approx(value, rel=1e-9, abs=1e-12), metric


def test_the_interval_is_that_of_a_plain_poisson_bootstrap() -> None:
    outputs = outputs_of(topk_sae())
    losses = {
        name: softmax_losses(output.logits_bc.double().numpy(), LABELS)  # type: ignore[union-attr]
        for name, output in outputs.items()
    }
    weights_br = poisson_weights("test", [f"image{i}" for i in range(N)])
    clean, spliced, zero = (
        (weights_br * losses[name][:, None]).sum(0) / weights_br.sum(0)
        for name in ("clean", "spliced", "zero")
    )
    expected = {
        "loss_increase": spliced - clean,
        "loss_recovered": (zero - spliced) / (zero - clean),
    }
    rows = rows_of(topk_sae(), batch=11)
    for metric, replicates_r in expected.items():
        low, high = np.quantile(replicates_r, [0.025, 0.975])
        assert interval(rows[metric, ""]) == pytest.approx((low, high), rel=1e-9), metric


# --- known answers -------------------------------------------------------------------------------


def test_identity_recovers_all_and_each_ablation_nothing() -> None:
    identity, zero, mean = (rows_of(c) for c in (Identity(D), Zero(D), Mean(MEAN)))
    assert identity["loss_recovered", ""].value == identity["loss_recovered_mean", ""].value == 1
    assert identity["loss_increase", ""].value == identity["kl_spliced", ""].value == 0
    assert identity["agreement_spliced", ""].value == 1
    assert identity["embedding_cosine_spliced", ""].value == 1
    assert identity["embedding_nmse_spliced", ""].value == 0
    assert zero["loss_recovered", ""].value == 0
    assert mean["loss_recovered_mean", ""].value == 0
    replicates = zero["loss_recovered", ""].replicates
    assert replicates is not None
    assert (replicates == 0).all()


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("n_classes", [6, 48, 1000])
def test_equal_similarity_to_every_class_is_ln_c(scale: float, n_classes: int) -> None:
    text_cd = torch.ones(n_classes, 4, dtype=torch.float64) / 2
    head = ZeroShot(text_cd, scale, {"loss": "zero_shot_ce"})
    labels = np.arange(N) % n_classes
    logits_bc = head.logits(Output(drawn(N, 4, seed=4)))
    terms_bq = image_terms(logits_bc, torch.as_tensor(labels), Prediction.of(logits_bc))
    np.testing.assert_allclose(terms_bq[:, 1], math.log(n_classes), rtol=1e-14)
    # Of classes that are exactly alike the first is taken, and the first five.
    logits_bc = logits_bc[:, :1].expand(-1, n_classes)
    terms_bq = image_terms(logits_bc, torch.as_tensor(labels), Prediction.of(logits_bc))
    assert terms_bq[:, 2].tolist() == [label == 0 for label in labels]
    assert terms_bq[:, 3].tolist() == [label < 5 for label in labels]


def test_kl_of_a_probability_that_underflows() -> None:
    """log(softmax) gives NaN here, and in float32 the probability is 0."""
    clean, other = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    terms_bq = image_terms(other.double(), torch.tensor([0]), Prediction.of(clean.double()))
    assert terms_bq[0, TERMS.index("kl")] == 200.0
    assert terms_bq[0, TERMS.index("loss")] == 200.0
    assert torch.isnan(clean.softmax(1) * (clean.softmax(1) / other.softmax(1)).log()).any()


def test_of_equal_logits_the_lowest_class_comes_first() -> None:
    logits_bc = torch.tensor([[1.0, 3, 3, 0, 3, 2, 2], [0, 0, 0, 0, 0, 0, 0]])
    assert predicted(logits_bc).tolist() == [1, 0]
    ranks = [rank(logits_bc, torch.tensor([c, c])).tolist() for c in range(7)]
    assert [r[0] for r in ranks] == [5, 0, 1, 6, 2, 3, 4]
    assert [r[1] for r in ranks] == list(range(7))


# --- published tables ----------------------------------------------------------------------------


def recovered(zero: float, spliced: float, clean: float) -> float:
    means = {"zero": zero, "spliced": spliced, "clean": clean}
    return float(loss_recovered({k: {"loss": np.array(v)} for k, v in means.items()}, "zero"))


DINO_B = [  # Prisma's table: clean, reconstructed and ablated loss, and what is recovered in %
    (1.885033, 1.936518, 7.2714, 99.04),
    (1.885100, 1.998274, 7.2154, 97.88),
    (1.885134, 2.006115, 7.2015, 97.72),
    (1.885131, 1.961913, 7.2068, 98.56),
    (1.885224, 1.883169, 7.1636, 100.04),
    (1.885353, 1.875520, 7.1412, 100.19),
    (1.885239, 1.872594, 7.1480, 100.24),
    (1.885371, 1.869443, 7.1694, 100.30),
    (1.885511, 1.978638, 7.1315, 98.22),
    (1.885341, 1.894026, 7.0781, 99.83),
    (1.885371, 1.884487, 7.3606, 100.02),
    (1.885370, 1.911608, 6.9078, 99.48),
]


@pytest.mark.parametrize(("clean", "spliced", "zero", "percent"), DINO_B)
def test_the_published_table_of_dino_b(
    clean: float, spliced: float, zero: float, percent: float
) -> None:
    assert round(100 * recovered(zero, spliced, clean), 2) == percent


def test_other_published_values() -> None:
    assert recovered(6.772939, 6.762009, 6.762171) == pytest.approx(1.0150446, abs=5e-8)
    assert recovered(13.0766, 4.7141, 4.6936) == pytest.approx(0.9975546, abs=5e-8)
    # A stored value of another project is a mean of ratios, and not this.
    assert round(recovered(13.25166, 3.84045, 3.33613), 5) == 0.94914 != 0.94898
    assert round(recovered(13.25166, 5.20820, 3.33613), 5) == 0.81120 != 0.81062
    assert recovered((10 + 3.5) / 2, (2 + 3.2) / 2, (1 + 3) / 2) == pytest.approx(
        0.8736842, abs=5e-8
    )


def test_above_one_and_below_zero_are_reported() -> None:
    labels = predicted(X[:, 0] @ W_DC).numpy()
    towards_label = W_DC.T[torch.as_tensor(labels)].repeat_interleave(T, 0)
    better = rows_of(Moved(lambda x: x + towards_label), rest=reads_cls, labels=labels)
    worse = rows_of(Moved(lambda x: -3 * x), rest=reads_cls, labels=labels)
    assert better["loss_recovered", ""].value > 1  # type: ignore[operator]
    assert worse["loss_recovered", ""].value < 0  # type: ignore[operator]
