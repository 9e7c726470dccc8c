"""The task `loss_substitution` against closed forms, NumPy twins and published tables.

A small stand-in takes the place of what comes after the site; tests/test_task_loss_substitution_
hooks.py has real backbones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.backbones import Output
from saebench.controls import Identity, Mean, Zero
from saebench.errors import DataError, SaebenchError
from saebench.metrics import ImageSums, poisson_weights
from saebench.metrics.substitution import (
    PASSES,
    SMALLEST_GAP,
    TERMS,
    Prediction,
    image_terms,
    loss_recovered,
    predicted,
    rank,
    values,
)
from saebench.readouts import OwnHead, ZeroShot
from saebench.rows import interval
from saebench.splice import POLICIES
from saebench.task import Measurement, Task, variant_string
from tests.measure import context, finished, local_batches, measure, measured, task_class
from tests.test_task_reconstruction import topk_sae

D, T, C, N = 12, 5, 8, 40
KINDS = {"cls": slice(0, 1), "patches": slice(1, T)}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = drawn(N, T, D, seed=1) + 0.5
MEAN = X.mean(0)
LABELS = np.random.default_rng(0).integers(0, C, N)
W_DC = drawn(D, C, seed=2)


def rest(x_btd: Tensor) -> Output:
    """What comes after the site: a mean over tokens, and a head."""
    embedding_bd = torch.tanh(x_btd.mean(dim=1))
    return Output(embedding_bd, embedding_bd @ W_DC * 2)


def reads_cls(x_btd: Tensor) -> Output:
    return Output(x_btd[:, 0].clone(), x_btd[:, 0] @ W_DC)


def how(**more: Any) -> dict[str, Any]:
    """A context and batches of the stand-in."""
    batches = {"rest": more.pop("rest", rest), "mean_td": MEAN, **more.pop("batches", {})}
    given = {"labels": LABELS, "kinds": KINDS, "readouts": [OwnHead(slice(0, C))]}
    return {**given, "site_kinds": tuple(KINDS), "batches": batches, **more}


def rows_of(coder: Any, x_btd: Tensor = X, **more: Any) -> dict[tuple[str, str], Measurement]:
    """(metric, variant) -> row."""
    found = measure("loss_substitution", x_btd, coder, **how(**more))
    return {(metric, variant): row for (metric, _, variant), row in found.items()}


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
    better = rows_of(_Moved(lambda x: x + towards_label), rest=reads_cls, labels=labels)
    worse = rows_of(_Moved(lambda x: -3 * x), rest=reads_cls, labels=labels)
    assert better["loss_recovered", ""].value > 1  # type: ignore[operator]
    assert worse["loss_recovered", ""].value < 0  # type: ignore[operator]


class _Moved(Identity):
    """A coder whose reconstruction is a function of x."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__(D)
        object.__setattr__(self, "move", move)

    def decode(self, codes: Any) -> Tensor:
        return self.move(codes.dense())  # type: ignore[attr-defined]


# --- null rules ----------------------------------------------------------------------------------


def test_a_gap_that_is_too_small_has_no_share() -> None:
    rows = rows_of(topk_sae(), rest=lambda x: Output(rest(x).embedding_bd, x.mean(1) @ W_DC * 1e-5))
    row = rows["loss_recovered", ""]
    assert row.value is None
    assert row.note.startswith("|loss_zero − loss_clean| = ")
    assert row.note.endswith(" nat, below 0.001")
    assert rows["loss_increase", ""].value is not None
    assert rows["kl_spliced", ""].value is not None


def test_a_gap_within_its_standard_error_has_no_share() -> None:
    """Losses 0 or 2 that the ablation swaps between images: the gap is noise."""
    n = 100
    clean_b = torch.tensor([0.0, 2.0] * (n // 2)).double()
    zero_b = torch.tensor([2.0, 0.0] * (n // 2)).double()
    zero_b[:2] += 0.9  # a gap of 0.018, and a standard error of about 0.2
    sums = summed({"clean": clean_b, "spliced": clean_b + 0.1, "zero": zero_b, "mean": zero_b + 3})
    found = {v.metric: v for v in values(sums, 0, dict.fromkeys(PASSES, ""), same_tokens=True)}
    gap, error = found["loss_recovered"].note.removesuffix(".").split(" nat, below its ")
    assert gap == "|loss_zero − loss_clean| = 0.018"
    assert float(error.removeprefix("standard error ")) == pytest.approx(0.2, rel=0.15)
    assert found["loss_recovered_mean"].value == pytest.approx((3.018 - 0.1) / 3.018)


def summed(losses: dict[str, Tensor]) -> dict[str, ImageSums]:
    from saebench.metrics import Contracted

    found = {}
    for name, loss_b in losses.items():
        terms_bq = torch.zeros(len(loss_b), len(TERMS), dtype=torch.float64)
        terms_bq[:, 0], terms_bq[:, 1] = 1, loss_b
        weights = torch.as_tensor(poisson_weights("test", [str(i) for i in range(len(loss_b))]))
        found[name] = ImageSums(1, len(TERMS))
        found[name].add(Contracted.of(terms_bq[None], weights))
    return found


@pytest.mark.parametrize("gap", [SMALLEST_GAP * 0.99, SMALLEST_GAP * 1.01])
def test_the_smallest_gap(gap: float) -> None:
    ones = torch.ones(20, dtype=torch.float64)
    sums = summed({"clean": ones, "spliced": ones, "zero": ones + gap, "mean": ones - gap})
    found = {v.metric: v for v in values(sums, 0, dict.fromkeys(PASSES, ""), same_tokens=True)}
    for metric in ("loss_recovered", "loss_recovered_mean"):
        assert (found[metric].value is None) == (gap < SMALLEST_GAP), metric


@pytest.mark.parametrize("n_classes", [2, 5, 6])
def test_few_classes_have_no_top_five(n_classes: int) -> None:
    rows = rows_of(topk_sae(), readouts=[OwnHead(slice(0, n_classes))], labels=LABELS % n_classes)
    for name in PASSES:
        row = rows[f"accuracy_top5_{name}", ""]
        assert (row.value is None) == (n_classes <= 5)
        assert row.note == ("" if n_classes > 5 else f"there are only {n_classes} classes")
        assert rows[f"accuracy_{name}", ""].value is not None


COMPARING = ("spliced", "zero", "mean", "increase", "recovered")


def test_tokens_that_the_output_cannot_see_are_vacuous() -> None:
    rows = rows_of(
        topk_sae(),
        rest=reads_cls,
        options={"replaced": "patches"},
        sees=lambda policy: policy != "patches",
    )
    assert {variant for _, variant in rows} == {"replaced=patches"}
    for (metric, _), row in rows.items():
        if metric.endswith("clean"):
            assert (row.value is not None, row.note) == (True, ""), metric
        else:
            assert row.value is None
            assert row.note == "vacuous: the output cannot change with the tokens 'patches'"


def test_what_is_found_vacuous_only_by_ablating_is_so_too() -> None:
    """The head reads what `sees` does not tell from the embedding."""
    rows = rows_of(topk_sae(), rest=reads_cls, options={"replaced": "patches"})
    for metric in ("loss_recovered", "kl_spliced", "embedding_nmse_spliced", "accuracy_zero"):
        row = rows[metric, "replaced=patches"]
        assert row.value is None
        assert row.note.startswith("vacuous: ablating these tokens changes nothing"), metric


def test_only_what_is_replaced_is_vacuous_where_something_else_is_ablated() -> None:
    rows = rows_of(
        topk_sae(),
        rest=reads_cls,
        options={"replaced": "patches", "ablated": "cls"},
        sees=lambda policy: policy != "patches",
    )
    variant = "ablated=cls;replaced=patches"
    assert rows["loss_zero", variant].value is not None
    assert rows["kl_mean", variant].value is not None
    for metric in ("loss_spliced", "loss_recovered", "loss_recovered_mean", "accuracy_spliced"):
        assert rows[metric, variant].note.startswith("vacuous"), metric


def test_tokens_that_the_site_does_not_have() -> None:
    rows = rows_of(
        topk_sae(),
        options={"replaced": "registers"},
        sees=lambda policy: None if policy == "registers" else True,
    )
    row = rows["loss_recovered", "replaced=registers"]
    assert (row.value, row.note) == (None, "the site test has no tokens 'registers'")
    assert rows["loss_clean", "replaced=registers"].value is not None


# --- what a row says -----------------------------------------------------------------------------

HEADS = [
    ZeroShot(W_DC.T.double(), 20.0, {"loss": "zero_shot_ce", "temperature": "model"}),
    ZeroShot(
        W_DC.T.double(),
        1.0,
        {"loss": "zero_shot_ce", "temperature": "1"},
        {"temperature": "1"},
    ),
]


def test_every_row_states_head_and_tokens() -> None:
    rows = rows_of(topk_sae(), readouts=HEADS, options={"ablated": "cls"})
    for (metric, variant), row in rows.items():
        assert row.columns["replaced"] == "sae_tokens"
        assert row.columns["ablated"] == "cls"
        if metric.startswith("embedding"):
            assert variant == "ablated=cls"
            assert "loss" not in row.columns
        else:
            temperature = "1" if "temperature=1" in variant else "model"
            assert row.columns["temperature"] == temperature
            assert row.columns["loss"] == "zero_shot_ce"
    assert {v for m, v in rows if m == "kl_zero"} == {"ablated=cls", "ablated=cls;temperature=1"}


def test_each_readout_has_its_own_values() -> None:
    rows = rows_of(topk_sae(), readouts=HEADS)
    alone = rows_of(topk_sae(), readouts=HEADS[1:])
    for (metric, variant), row in alone.items():
        assert rows[metric, variant].value == row.value
    assert rows["loss_mean", ""].value != rows["loss_mean", "temperature=1"].value


@pytest.mark.parametrize("option", ["head=linear", "head=probe", "names=scientific"])
def test_a_head_that_is_not_the_default_is_in_the_variant(option: str) -> None:
    """Also of what no head changes: a unit of its own has rows of its own."""
    name, value = option.split("=")
    linear = OwnHead(slice(0, C), {"loss": "linear_head_ce", "temperature": "model"})
    rows = rows_of(topk_sae(), readouts=[linear], options={name: value})
    assert {variant for _, variant in rows} == {option}
    assert rows["embedding_nmse_spliced", option].value is not None
    assert rows["loss_clean", option].columns["loss"] == "linear_head_ce"


def test_what_the_last_block_leaves_out_is_in_the_variant() -> None:
    rows = rows_of(topk_sae(), last_block="cls")
    assert {variant for _, variant in rows} == {"last_block=cls"}


def test_tokens_that_the_sae_was_not_trained_on_are_named() -> None:
    of_cls = {
        "kinds": {"cls": slice(0, 1)},
        "site_kinds": ("cls", "registers", "patches"),
        "options": {"replaced": "all"},
    }
    batches = {"rest": rest, "mean_td": MEAN[:1]}
    rows = rows_of(topk_sae(), X[:, :1], **of_cls, batches=batches)
    note = "it was not trained on these of the replaced tokens: registers, patches"
    for metric in ("loss_spliced", "loss_recovered", "embedding_cosine_spliced"):
        assert rows[metric, "replaced=all"].note == note
    assert rows["loss_zero", "replaced=all"].note == ""
    assert (
        rows_of(topk_sae(), options={"replaced": "all"})["loss_spliced", "replaced=all"].note == ""
    )


def test_rows_are_declared_and_within_bounds() -> None:
    declared = {m.name: m for m in task_class("loss_substitution").metrics}
    for coder in (topk_sae(), Zero(D), Identity(D), Mean(MEAN)):
        for (metric, _), row in rows_of(coder, readouts=HEADS).items():
            low, high = declared[metric].bounds
            assert (row.value is None) == bool(row.note)
            if row.value is not None:
                assert low is None or row.value >= low - 1e-12
                assert high is None or row.value <= high + 1e-12
            if row.value is not None and declared[metric].interval == "bootstrap":
                assert row.replicates is not None


def test_policies_of_the_task_are_those_of_a_splice() -> None:
    options = task_class("loss_substitution").options
    assert options["replaced"].choices == POLICIES
    assert options["ablated"].choices == ("replaced", *POLICIES)
    from saebench.heads import HEADS as NAMES

    assert options["head"].choices == NAMES


# --- the numerical contract ----------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 7, N])
def test_any_partition_gives_the_same_numbers(batch: int) -> None:
    """Contract (a): from the same outputs, 1e-12 relative; where the embedding has a large mean."""

    def by_image(x_btd: Tensor) -> Output:
        """One image at a time, so that no product depends on the batch."""
        parts = [rest(x[None]) for x in x_btd]
        embedding_bd = torch.cat([p.embedding_bd for p in parts]) + 100
        return Output(embedding_bd, torch.cat([p.logits_bc for p in parts]))  # type: ignore[misc]

    whole = rows_of(Mean(MEAN * 1.1), rest=by_image)
    parts = rows_of(Mean(MEAN * 1.1), rest=by_image, batch=batch)
    for key, row in whole.items():
        assert parts[key].value == pytest.approx(row.value, rel=1e-12, abs=1e-14), key
        found, wanted = parts[key].replicates, row.replicates
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-13, err_msg=str(key))


def test_segments_fold_to_the_same_bits_whoever_computed_them() -> None:
    def task(**more: Any) -> Task:
        return finished("loss_substitution", X, topk_sae(), batch=5, **how(**more))

    one, other = task(segments=[10, 25]), task(segments=[10, 25])
    for name, array in one.state().items():
        np.testing.assert_array_equal(array, other.state()[name])
    fresh = task_class("loss_substitution")()
    fresh.start(one.ctx)  # type: ignore[attr-defined]
    fresh.merge(one.state())
    assert values_in(fresh) == values_in(one)
    for key, value in values_in(task()).items():
        if value is not None:
            assert values_in(one)[key] == pytest.approx(value, rel=1e-11, abs=1e-13), key


def values_in(task: Task) -> dict[Any, float | None]:
    return {key: row.value for key, row in measured(task).items()}


class _Counted(OwnHead):
    """A head that counts how often it is asked."""

    calls = 0

    def logits(self, output: Output) -> Tensor:
        type(self).calls += 1
        return super().logits(output)


def test_saes_that_share_a_batch_get_what_they_get_alone() -> None:
    """And clean and ablated terms are computed once for all of them."""
    saes = [topk_sae(seed=seed) for seed in (0, 3, 4)]
    given = how(readouts=[_Counted(slice(0, C))])
    extra, labels = given.pop("batches"), given.pop("labels")
    tasks, streams = [], []
    for sae in saes:
        tasks.append(task_class("loss_substitution")())
        ctx = context(X, sae, **given)
        tasks[-1].start(ctx)
        streams.append(local_batches(X, sae, ctx, 8, labels, **extra))
    for batches in zip(*streams, strict=True):
        shared: dict[str, Any] = {}
        for task, batch in zip(tasks, batches, strict=True):
            batch.memo = shared
            task.update(batch)
    assert _Counted.calls == N // 8 * (3 + len(saes))
    for sae, task in zip(saes, tasks, strict=True):
        alone = finished("loss_substitution", X, sae, batch=8, **how())
        assert values_in(task) == values_in(alone)


# --- refusals ------------------------------------------------------------------------------------


def test_a_label_that_the_head_has_no_class_for() -> None:
    with pytest.raises(DataError, match="go from 0 to 7, and the head tells 6 classes apart"):
        rows_of(topk_sae(), readouts=[OwnHead(slice(0, 6))], labels=np.arange(N) % 8)


def test_an_output_that_is_not_finite() -> None:
    def overflows(x_btd: Tensor) -> Output:
        return Output(x_btd.mean(1) / x_btd.abs().sum(), x_btd.mean(1) @ W_DC)

    with pytest.raises(SaebenchError, match="embedding of the zero pass is NaN"):
        rows_of(topk_sae(), rest=overflows)


def test_variants_are_canonical() -> None:
    assert variant_string({"temperature": "1", "replaced": "all"}) == "replaced=all;temperature=1"
