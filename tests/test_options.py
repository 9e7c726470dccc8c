"""Choices that tasks leave to their user: how they are said, and that one result has one unit."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import saebench
from saebench.api import source_of
from saebench.errors import SpecError, UsageError
from saebench.options import read_options
from saebench.plan import make_plan
from saebench.registry import Registry
from saebench.runconfig import RunConfig
from saebench.taskfiles import load_task
from tests.content import write

TASK = "loss_substitution"


def ids(*options: str, backbone: str = "tiny-clip", **more: object) -> set[str]:
    config = RunConfig(
        backbone=(backbone,),
        task=(TASK,),
        sae=("identity",),
        option=tuple(f"{TASK}.{option}" for option in options),
        limit=64,
        **more,  # type: ignore[arg-type]
    )
    return {unit.id for unit in make_plan(config, Registry.load([]), source_of).units}


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("replaced=all", "not of the form TASK.NAME=VALUE", "loss_substitution.replaced="),
        ("loss_substitution.replaced", "not of the form", "replaced="),
        ("loss_substitution.replaced=", "not of the form", "replaced="),
        ("sparsity.replaced=all", "no task 'sparsity' is run", "loss_substitution.head="),
        ("loss_substitution.replace=all", "no option 'replace'", "did you mean 'replaced'"),
        ("loss_substitution.replaced=some", "'some' is none of its choices", "sae_tokens, all"),
    ],
)
def test_what_is_not_an_option_is_refused(text: str, what: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        read_options([text], [load_task(Registry.load([]), TASK)])
    assert what in error.value.what
    assert hint in error.value.hint


def test_what_is_offered_can_be_typed() -> None:
    """An option that is empty by default has no value to show."""
    tasks = [load_task(Registry.load([]), name) for name in (TASK, "linear_probe")]
    with pytest.raises(UsageError) as error:
        read_options(["label"], tasks)
    offered = error.value.hint.removeprefix("there are: ").split("  ")
    assert len(offered) == sum(len(task.options) for task in tasks)
    assert "linear_probe.label=LABEL" in offered
    for one in offered:
        for choice in one.partition("=")[2].split("|"):
            assert read_options([f"{one.partition('=')[0]}={choice}"], tasks)


def test_one_run_has_one_value() -> None:
    task = load_task(Registry.load([]), TASK)
    twice = [f"{TASK}.replaced=all", f"{TASK}.replaced=all"]
    assert read_options(twice, [task]) == {TASK: {"replaced": "all"}}
    with pytest.raises(UsageError, match="it was given as 'all' too"):
        read_options([*twice, f"{TASK}.replaced=cls"], [task])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((), ("replaced=sae_tokens",)),
        ((), ("ablated=sae_tokens",)),
        (("replaced=cls",), ("replaced=cls", "ablated=cls")),
        ((), ("names=default",)),
        (("head=probe",), ("head=linear",)),  # there is no published head
        (("head=probe",), ("head=probe", "names=scientific")),  # which reads no text
    ],
)
def test_one_result_has_one_unit(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert ids(*one) == ids(*other)


def test_the_head_that_is_read_anyway_is_no_choice() -> None:
    assert ids(backbone="tiny-dinov2") == ids("head=linear", backbone="tiny-dinov2")
    assert ids(backbone="tiny-vit") == ids("names=scientific", backbone="tiny-vit")


def test_what_can_change_a_number_makes_another_unit() -> None:
    choices = [(), ("replaced=cls",), ("replaced=all",), ("ablated=all",), ("head=linear",)]
    found = [ids(*choice) for choice in choices] + [ids(last_block="cls"), ids(dtype="bfloat16")]
    assert len(set.union(*found)) == len(found)


def test_peers_say_themselves_which_tokens_they_mean() -> None:
    plain, other = ids(conventions=True), ids("replaced=cls", conventions=True)
    assert len(plain) == len(other) == 2
    assert plain & other, "the unit of the peers' formulas is the same"
    assert plain != other


def test_names_that_a_dataset_does_not_have_are_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="no names 'bogus'") as error:
        ids("names=bogus")
    assert "they have: default" in error.value.hint


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('options = {"x": 1}', "the option 'x' is 1, not a saebench.task.Option"),
        ('needs = ("readuots",)', "nothing called 'readuots'"),
    ],
)
def test_a_task_file_of_another_form_is_refused(line: str, what: str, tmp_path: Path) -> None:
    source = HEADS.replace("    metrics = ", f"    {line}\n    metrics = ")
    content = write(tmp_path / "c", {"tasks/heads.py": source})
    with pytest.raises(SpecError) as error:
        load_task(Registry.load([content]), "heads")
    assert what in error.value.what


HEADS = '''
from saebench.task import Measurement, Metric, Task


class Heads(Task):
    """How many heads it is given, and what reads them."""

    name, version, needs = "heads", 1, ("readouts",)
    metrics = (Metric("n_heads", "1", "none"),)

    def start(self, ctx):
        from saebench.metrics import Total

        self.heads, self.parts = ctx.readouts, {"seen": Total()}

    def update(self, batch):
        self.parts["seen"].add(0.0, batch.n_images)

    def results(self):
        yield Measurement("n_heads", len(self.heads), n=1, columns=self.heads[0].columns)
'''


@pytest.mark.parametrize("order", [("heads", TASK), (TASK, "heads")])
def test_each_task_reads_the_heads_of_its_own_choice(
    order: tuple[str, ...], tmp_path: Path
) -> None:
    content = write(tmp_path / "c", {"tasks/heads.py": HEADS})
    rows: pd.DataFrame = saebench.run(
        backbone="tiny-clip",
        sae="identity",
        task=order,
        option=f"{TASK}.head=probe",
        limit=48,
        registry=str(content),
        out=tmp_path / "out",
    )
    own = rows[rows.task == "heads"].iloc[0]
    assert (own.value, own["head"]) == (4, "zero_shot")
    other = rows[(rows.task == TASK) & (rows.metric == "loss_clean")]
    assert list(other["head"]) == ["probe"]
