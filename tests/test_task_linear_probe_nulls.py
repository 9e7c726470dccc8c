"""Where `linear_probe` has no value and says why, and where it stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.backbones import Output
from saebench.controls import Identity, Zero
from saebench.errors import DataError, SaebenchError
from saebench.probing.probes import Probes
from saebench.task import Measurement
from tests.measure import measure
from tests.random_probes import CODER, KINDS, LABELS, C, D, N, X, fitted, probes

Row = dict[tuple[str, str], Measurement]


def rows_of(some: Probes, coder: Any = CODER, **more: Any) -> Row:
    given = {"kinds": KINDS, "labels": LABELS, **more}
    found = measure("linear_probe", given.pop("x", X), coder, probes=some, **given)
    return {(metric, variant): row for (metric, _, variant), row in found.items()}


def empty(rows: Row) -> dict[str, set[str]]:
    """Why -> metrics that are undefined."""
    found: dict[str, set[str]] = {}
    for (metric, _), row in rows.items():
        if row.value is None:
            assert row.replicates is None
            assert "baseline" not in row.columns
            found.setdefault(row.note, set()).add(metric)
    return found


def every(rows: Row, is_one: Callable[[str], bool]) -> set[str]:
    return {metric for metric, _ in rows if is_one(metric)}


def of_xhat(metric: str) -> bool:
    return "frozen" in metric or "refit" in metric


def of_codes(metric: str) -> bool:
    return metric.startswith(("sparse", "tree")) or "codes" in metric or metric == "probe_r_1d"


def test_a_transcoder_has_no_reconstruction() -> None:
    why = "a transcoder's output is not an estimate of what it reads"
    rows = rows_of(probes(xhat=None, missing={"xhat": why}))
    assert empty(rows)[why] == every(rows, of_xhat)
    assert rows["probe_delta_codes", ""].value is not None


def test_a_control_without_latents_has_no_codes() -> None:
    some = probes(codes={}, sparse={}, tree=None, single=None, missing={"codes": "no latents"})
    rows = rows_of(some, Zero(D))
    assert empty(rows) == {"no latents": every(rows, of_codes)}
    assert rows["probe_delta_frozen", ""].value is not None
    assert rows["probe_accuracy_codes", ""].columns["pooling"] == "max"


def test_more_latents_than_there_are() -> None:
    rows = rows_of(probes())
    assert CODER.d_sae == 24
    too_many = {f"k{k}" for k in (50, 100)}
    assert empty(rows)["there are only 24 latents"] == every(
        rows, lambda metric: bool(too_many & set(metric.split("_")))
    )
    few = empty(rows_of(probes("cls+mean")))
    assert "there are only 48 latents" in few
    assert "sparse_probe_loss_k20" in few["no probe of 20 latents was fitted"]


def test_ridge_has_no_probabilities() -> None:
    rows = rows_of(probes(), options={"solver": "ridge"})
    logistic = rows_of(probes())
    lost = empty(rows)["ridge scores are no probabilities"]
    losses = {m for (m, _), row in logistic.items() if "_loss_" in m and row.value is not None}
    at_level = {metric for metric, variant in rows if variant == "level=genus"}
    assert lost == losses | at_level
    assert rows["probe_accuracy_x", ""].value is not None
    assert rows["probe_delta_codes_macro", ""].value is not None
    assert rows["probe_accuracy_x", "level=genus"].value is None
    for metric in ("probe_accuracy_xhat_refit_top5", "probe_delta_codes"):
        assert rows[metric, ""].value == logistic[metric, ""].value


def five(d: int, seed: int, **more: Any) -> Any:
    one = fitted(d, seed, **more)
    return replace(one, W_dc=one.W_dc[:, :5].clone(), b_c=one.b_c[:5].clone())


def test_five_classes_have_no_top5() -> None:
    some = Probes(probes().feature, "", 5, five(D, 1), five(D, 2), {"max": five(24, 3)})
    rows = rows_of(some, labels=LABELS % 5)
    assert empty(rows)["there are only 5 classes"] == every(
        rows, lambda metric: metric.endswith("_top5") and not metric.startswith("sparse")
    )


def test_no_images_at_all() -> None:
    rows = rows_of(probes(), x=X[:0], labels=LABELS[:0])
    assert all(row.value is None and row.note and row.n == 0 for row in rows.values())
    assert rows["probe_r_1d", ""].note == rows["probe_accuracy_x", ""].note == "no images"


# The embedding


def rest(x_btd: Tensor) -> Output:
    return Output(torch.tanh(x_btd.mean(dim=1)), None)


def embedded(coder: Any = CODER, some: Probes | None = None, **more: Any) -> Row:
    some = probes() if some is None else some
    read = replace(some, feature=replace(some.feature, name="embedding", parts=()))
    return rows_of(read, coder, batches={"rest": rest}, **more)


def test_of_the_embedding() -> None:
    rows = embedded()
    for which, x_btd in (("x", X), ("xhat_frozen", CODER.xhat_nd.view_as(X))):
        logits = torch.tanh(x_btd.mean(dim=1)).double() @ probes().x.W_dc + probes().x.b_c
        right = (logits.argmax(1).numpy() == LABELS).mean()
        assert rows[f"probe_accuracy_{which}", ""].value == pytest.approx(right)
    assert rows["probe_loss_codes", ""].value == rows_of(probes())["probe_loss_codes", ""].value
    without_codes = probes(codes={}, sparse={}, tree=None, single=None)
    assert embedded(Identity(D), without_codes)["probe_loss_increase_frozen", ""].value == 0


def test_an_embedding_says_how_it_was_made() -> None:
    full, short = embedded(), embedded(last_block="cls")
    assert {row.columns["last_block"] for row in full.values()} == {"full"}
    assert {row.columns["last_block"] for row in short.values()} == {"cls"}
    assert not any("last_block" in row.variant for row in full.values())
    assert {row.variant["last_block"] for row in short.values()} == {"cls"}
    at_the_site = rows_of(probes(), last_block="cls")
    assert not any("last_block" in row.columns for row in at_the_site.values())


@pytest.mark.parametrize(
    ("context", "why"),
    [
        (
            {"sees": lambda policy, reads="any": reads == "features"},
            "vacuous: the embedding cannot change with the tokens 'sae_tokens'",
        ),
        ({"sees": lambda policy, reads="any": None}, "the site test has no tokens 'sae_tokens'"),
        ({"refused": lambda policy: f"{policy}: two cover them"}, "sae_tokens: two cover them"),
    ],
)
def test_what_no_splice_can_change(context: dict[str, Any], why: str) -> None:
    rows = embedded(**context)
    assert empty(rows)[why] == every(rows, of_xhat)
    assert rows["probe_accuracy_x", ""].value is not None
    assert rows["probe_accuracy_codes", ""].value is not None
    other = rows_of(probes(), **context)  # read at the site, where it is seen
    assert other["probe_accuracy_xhat_frozen", ""].value is not None


# Errors, and labels


@pytest.mark.parametrize("label", [-1, C])
def test_a_label_without_a_class(label: int) -> None:
    labels = LABELS.copy()
    labels[3] = label
    with pytest.raises(DataError, match=f"probes tell {C} classes apart"):
        rows_of(probes(), labels=labels)


def test_another_label_level() -> None:
    other = np.roll(LABELS, 1)
    some = probes(label="colour")
    rows = rows_of(some, labels=LABELS, batch=N, batches={"levels": {"colour": other}})
    expected = rows_of(probes(), labels=other)
    assert rows["probe_loss_codes", ""].value == expected["probe_loss_codes", ""].value
    assert rows["probe_loss_codes", ""].value != rows_of(probes())["probe_loss_codes", ""].value


def test_logits_that_are_not_finite() -> None:
    x = probes().x
    with pytest.raises(
        SaebenchError, match="logits of a probe are NaN or infinite near image image0"
    ):
        rows_of(probes(x=replace(x, b_c=x.b_c * torch.inf)))
