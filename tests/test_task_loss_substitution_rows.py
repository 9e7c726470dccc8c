"""What the rows of `loss_substitution` say, and that no partition changes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.backbones import Output
from saebench.controls import Identity, Mean, Zero
from saebench.errors import DataError, SaebenchError
from saebench.metrics.substitution import PASSES
from saebench.readouts import LinearHead, OwnHead, ZeroShot
from saebench.splice import POLICIES
from saebench.task import Task, variant_string
from tests.measure import context, finished, local_batches, measured, task_class
from tests.substitution import HEADS, MEAN, W_DC, C, D, N, X, how, rest, rows_of
from tests.test_task_reconstruction import topk_sae

# --- what a row says -----------------------------------------------------------------------------


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


def test_how_the_last_block_is_run_is_in_every_row() -> None:
    rows = rows_of(topk_sae(), last_block="cls")
    assert {variant for _, variant in rows} == {"last_block=cls"}
    assert {row.columns["last_block"] for row in rows.values()} == {"cls"}
    assert {row.columns["last_block"] for row in rows_of(topk_sae()).values()} == {"full"}


def test_the_head_that_was_found_is_in_every_row_of_its_unit() -> None:
    """Also in those that it does not change, so that rows of one unit share one variant."""
    probe = LinearHead(W_DC.double(), torch.zeros(C).double(), "probe", note="of 50 images")
    rows = rows_of(topk_sae(), readouts=[probe], options={"head": "linear"})
    assert {variant for _, variant in rows} == {"head=probe"}
    assert "embedding_nmse_spliced" in {metric for metric, _ in rows}
    row = rows["loss_clean", "head=probe"]
    assert row.note == "of 50 images"
    assert (row.columns["solver"], row.columns["feature"]) == ("logistic", "embedding")
    assert rows["loss_spliced", "head=probe"].note == ""
    published = LinearHead(W_DC.double(), torch.zeros(C).double(), "published", ("cls", "patches"))
    columns = rows_of(topk_sae(), readouts=[published])["loss_clean", ""].columns
    assert columns["feature"] == "cls+patches"
    assert "solver" not in columns


def test_texts_are_compared_once_for_all_temperatures() -> None:
    class Texts(ZeroShot):
        calls = 0

        def cosines(self, output: Output) -> Tensor:
            type(self).calls += 1
            return super().cosines(output)

    text_cd = W_DC.T.double()
    heads = [
        Texts(text_cd, 20.0, {"loss": "zero_shot_ce"}),
        Texts(text_cd, 1.0, {"loss": "zero_shot_ce"}, {"temperature": "1"}),
    ]
    rows = rows_of(topk_sae(), readouts=heads)
    assert Texts.calls == len(PASSES)
    for key, row in rows_of(topk_sae(), readouts=HEADS).items():
        assert rows[key].value == row.value


def test_tokens_that_the_sae_was_not_trained_on_are_named() -> None:
    foreign = {"all": ["registers", "patches of blocks.2"]}
    options = {"replaced": "all"}
    rows = rows_of(topk_sae(), options=options, foreign=lambda policy: foreign.get(policy, []))
    note = "it was not trained on these of the replaced tokens: registers, patches of blocks.2"
    for metric in ("loss_spliced", "accuracy_spliced", "embedding_cosine_spliced"):
        assert rows[metric, "replaced=all"].note == note
    assert rows["loss_recovered", "replaced=all"].note.endswith(f"; {note}")  # after a caution
    assert rows["loss_zero", "replaced=all"].note == ""
    own = rows_of(topk_sae(), foreign=lambda policy: foreign.get(policy, []))
    assert own["loss_spliced", ""].note == ""


def test_rows_are_declared_and_within_bounds() -> None:
    declared = {m.name: m for m in task_class("loss_substitution").metrics}
    for coder in (topk_sae(), Zero(D), Identity(D), Mean(MEAN)):
        for (metric, _), row in rows_of(coder, readouts=HEADS).items():
            low, high = declared[metric].bounds
            assert row.note or row.value is not None
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
