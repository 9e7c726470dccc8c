"""When a measure of `loss_substitution` has no answer: small gaps, tokens that reach nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.backbones import Output
from saebench.controls import Zero
from saebench.metrics import Contracted, ImageSums, poisson_weights
from saebench.metrics.substitution import PASSES, SMALLEST_GAP, TERMS, predicted, values
from saebench.readouts import LinearHead, OwnHead, ZeroShot
from tests.substitution import LABELS, W_DC, C, D, Moved, N, T, X, reads_cls, rest, rows_of
from tests.test_task_reconstruction import topk_sae

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


@pytest.mark.parametrize("n", [1, 2])
def test_one_image_has_no_standard_error(n: int) -> None:
    losses = {"clean": 1.0, "spliced": 2.0, "zero": 5.0, "mean": 4.0}
    sums = summed({name: torch.full((n,), loss).double() for name, loss in losses.items()})
    found = {v.metric: v for v in values(sums, 0, dict.fromkeys(PASSES, ""), same_tokens=True)}
    share = found["loss_recovered"]
    assert (share.value, "one image" in share.note) == ((None, True) if n == 1 else (0.75, False))
    assert found["loss_increase"].value == 1


def summed(losses: dict[str, Tensor]) -> dict[str, ImageSums]:
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
        sees=lambda policy, reads="any": policy != "patches",
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
        sees=lambda policy, reads="any": policy != "patches",
    )
    variant = "ablated=cls;replaced=patches"
    assert rows["loss_zero", variant].value is not None
    assert rows["kl_mean", variant].value is not None
    for metric in ("loss_spliced", "loss_recovered", "loss_recovered_mean", "accuracy_spliced"):
        assert rows[metric, variant].note.startswith("vacuous"), metric


def test_each_measure_asks_for_what_it_reads() -> None:
    """A linear head over the mean of the patches, and an embedding that is the CLS token."""

    def both(x_btd: Tensor) -> Output:
        return Output(x_btd[:, 0].clone(), features_bd=x_btd[:, 1:].mean(1))

    linear = LinearHead(W_DC.double(), torch.zeros(C).double(), "probe", ("patches",))
    own = ZeroShot(W_DC.T.double(), 3.0, {"loss": "zero_shot_ce"}, {"temperature": "1"})
    reach = {"cls": {"any", "embedding"}, "patches": {"any", "features"}, "all": {"any"}}
    for policy, unread in (("cls", "loss"), ("patches", "embedding")):
        rows = rows_of(
            topk_sae(),
            rest=both,
            readouts=[linear, own],
            options={"replaced": policy, "ablated": "all"},
            sees=lambda policy, reads="any": policy == "all" or reads in reach[policy],
        )
        variant = f"ablated=all;replaced={policy}"
        loss, cosine = rows["loss_spliced", variant], rows["embedding_cosine_spliced", variant]
        empty, other = (loss, cosine) if unread == "loss" else (cosine, loss)
        what = "what a linear head reads" if unread == "loss" else "the embedding"
        assert empty.value is None
        assert empty.note == f"vacuous: {what} cannot change with the tokens '{policy}'"
        assert other.value is not None
        # Another head of the same unit is judged by what it reads itself.
        of_embedding = rows["kl_spliced", f"{variant};temperature=1"]
        assert (of_embedding.value is None) == (cosine.value is None)
        assert rows["loss_zero", variant].value is not None


def test_an_ablation_that_changes_nothing_hides_no_cost() -> None:
    """x is 0, as what takes its place is; the reconstruction is not."""
    zero_btd = torch.zeros_like(X)
    biased = Moved(lambda x: x + 0.5)
    rows = rows_of(biased, zero_btd, batches={"mean_td": torch.zeros(T, D)})
    for metric in ("kl_spliced", "loss_increase", "embedding_nmse_spliced", "kl_zero"):
        row = rows[metric, ""]
        if metric == "embedding_nmse_spliced":  # embeddings that are all alike
            assert row.note == "the embeddings of all images are equal: there is no variance"
        else:
            assert row.value is not None, metric
    assert rows["kl_spliced", ""].value > 0  # type: ignore[operator]
    assert rows["kl_zero", ""].value == 0
    share = rows["loss_recovered", ""]
    assert share.note == "|loss_zero − loss_clean| = 0 nat, below 0.001"


def test_tokens_that_no_reconstruction_can_replace() -> None:
    why = "none of 'a', 'b' was trained on the tokens registers of 'test'"
    options = {"replaced": "all"}
    rows = rows_of(topk_sae(), options=options, refused=lambda policy: why)
    assert rows["loss_spliced", "replaced=all"].note == why
    assert rows["embedding_nmse_spliced", "replaced=all"].note == why
    assert rows["loss_zero", "replaced=all"].value is not None


def test_an_ablation_that_lowers_the_loss_is_said() -> None:
    labels = predicted(rest(torch.zeros(1, T, D)).embedding_bd @ W_DC).repeat(N).numpy()

    def constant(x_btd: Tensor) -> Output:  # 0 in the place of x is what a label asks for
        embedding_bd = rest(x_btd).embedding_bd
        logits_bc = embedding_bd @ W_DC
        logits_bc[:, int(labels[0])] -= embedding_bd.abs().sum(1)
        return Output(embedding_bd, logits_bc)

    rows = rows_of(topk_sae(), rest=constant, labels=labels)
    clean, spliced, zero = (rows[f"loss_{k}", ""].value for k in ("clean", "spliced", "zero"))
    assert zero < clean  # type: ignore[operator]
    row = rows["loss_recovered", ""]
    assert row.note == "the ablation lowers the loss: a larger share is worse here"
    assert row.value == pytest.approx((zero - spliced) / (zero - clean))  # type: ignore[operator]
    right = predicted(rest(X).embedding_bd @ W_DC).numpy()
    assert rows_of(topk_sae(), labels=right)["loss_recovered", ""].note == ""
    # What recovers nothing is 0, and not −0.
    nothing = rows_of(Zero(D), rest=constant, labels=labels)["loss_recovered", ""]
    assert math.copysign(1, nothing.value) == 1  # type: ignore[arg-type]
    assert nothing.replicates is not None
    assert not np.signbit(nothing.replicates[nothing.replicates == 0]).any()


def test_tokens_that_the_site_does_not_have() -> None:
    rows = rows_of(
        topk_sae(),
        options={"replaced": "registers"},
        sees=lambda policy, reads="any": None if policy == "registers" else True,
    )
    row = rows["loss_recovered", "replaced=registers"]
    assert (row.value, row.note) == (None, "the site test has no tokens 'registers'")
    assert rows["loss_clean", "replaced=registers"].value is not None
