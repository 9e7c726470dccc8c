"""Units of tasks that fit probes: their options, shots, identities and waves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest

from saebench import api
from saebench.api import config_of
from saebench.cli import main
from saebench.data.manifest import Manifest
from saebench.errors import SpecError, UsageError
from saebench.plan import Plan, make_plan
from saebench.probe_options import n_train_of
from saebench.registry import Registry
from saebench.runconfig import RunConfig
from saebench.specs import DatasetSpec
from saebench.taskfiles import load_task
from saebench.units import Source, Unit
from tests.content import BACKBONE, TASK, sae_entry, write

OPTIONS = """
    needs = ("probes",)
    options = {
        "feature": Option("auto"),
        "label": Option(""),
        "shots": Option("full"),
        "solver": Option("logistic", ("logistic", "ridge")),
    }
"""
PROBES = (
    TASK.replace("import Measurement", "import Option, Measurement")
    .replace('name = "rows"', 'name = "probing"')
    .replace("    version = 1\n", "    version = 1\n" + OPTIONS)
)
N_TRAIN = {"digits": 1257, "shapes": 4096}

Planned = Callable[..., Plan]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    return planning(tmp_path_factory.mktemp("content"))


@pytest.fixture(scope="module")
def planned_too(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """With an SAE of patches beside that of all tokens."""
    patches = {"registry/saes/small/patches.toml": sae_entry(tokens="patches", l0=4.0)}
    return planning(tmp_path_factory.mktemp("more"), patches)


def planning(folder: Path, more: Mapping[str, str] = MappingProxyType({})) -> Planned:
    files = {
        "registry/backbones/small.toml": BACKBONE,
        "registry/saes/small/a.toml": sae_entry(l0=4.0),
        "registry/saes/small/sae.safetensors": "x" * 1000,
        "tasks/rows.py": TASK,
        "tasks/probing.py": PROBES,
    }
    root = write(folder, {**files, **more})
    registry, opened = Registry.load([root]), dict[tuple[str, int | None], Source]()

    def source_of(spec: DatasetSpec, config: RunConfig) -> Source:
        key = spec.name, config.train_limit
        if key not in opened:
            opened[key] = api.source_of(spec, config)
        return opened[key]

    def plan(change: Callable[[Source], Source] = lambda source: source, **options: Any) -> Plan:
        given = {"backbone": "small", "sae": "identity", "task": "probing", **options}
        return make_plan(config_of(**given), registry, lambda *of: change(source_of(*of)))

    return plan


def one(plan: Plan) -> Unit:
    (unit,) = plan.units
    return unit


@pytest.mark.parametrize("dataset", N_TRAIN)
def test_they_are_fitted_on_all_train_images(planned: Planned, dataset: str) -> None:
    unit = one(planned(dataset=dataset))
    assert unit.source.n_full == N_TRAIN[dataset] == n_train_of(unit)
    fewer = one(planned(dataset=dataset, train_limit=100))
    assert fewer.source.n_full == 100
    assert fewer.id != unit.id
    more = one(planned(dataset=dataset, train_limit=10**6))
    assert more.source.n_full == N_TRAIN[dataset]


@pytest.mark.parametrize(
    "option", ["shots=5", "solver=ridge", "feature=mean", "label=family", "feature=embedding"]
)
def test_each_choice_is_a_unit_of_its_own(planned: Planned, option: str) -> None:
    assert one(planned(option=f"probing.{option}")).id != one(planned()).id


@pytest.mark.parametrize(
    ("sae", "same", "others"),
    [
        ("small/a", "cls", ["mean", "cls+mean", "embedding"]),
        ("small/patches", "mean", ["embedding"]),
    ],
)
def test_the_usual_feature_by_another_name_is_no_other_unit(
    planned_too: Planned, sae: str, same: str, others: list[str]
) -> None:
    usual = one(planned_too(sae=sae))
    named = one(planned_too(sae=sae, option=f"probing.feature={same}"))
    assert named.options["feature"] == "auto"
    assert named.id == usual.id
    ids = {one(planned_too(sae=sae, option=f"probing.feature={name}")).id for name in others}
    assert len(ids | {usual.id}) == len(others) + 1


@pytest.mark.parametrize("feature", ["cls", "cls+mean", "pooled"])
def test_a_feature_that_a_coder_does_not_cover_leaves_the_others(
    planned_too: Planned, feature: str
) -> None:
    options = {"sae": ["small/a", "small/patches"], "task": ["rows", "probing"]}
    plan = planned_too(option=f"probing.feature={feature}", **options)
    covers = ["small/patches"] if feature != "pooled" else ["small/a", "small/patches"]
    assert [refusal.name.split(" · ")[-2:] for refusal in plan.refused] == [
        [name, "probing"] for name in covers
    ]
    said = str(plan.refused[-1].error)
    missing = "pooled" if feature == "pooled" else "cls"
    assert f"reads {missing}, and 'small/patches' covers patches" in said
    assert "choose another of: auto, cls, mean" in said
    found = [(u.task.name, u.coder.name) for u in plan.units]
    everything = [(task, name) for name in options["sae"] for task in options["task"]]
    assert found == [pair for pair in everything if pair[0] == "rows" or pair[1] not in covers]


def test_probes_make_no_more_waves(planned: Planned) -> None:
    """Their weights are read from files: two coders of 2,000 bytes, and identity, share a pass."""
    saes = ["small/a", "small/a@random", "identity"]
    (group,) = planned(task=["rows", "probing"], sae=saes, shots=[1, 5], memory="4KB").groups
    assert [wave.n_bytes for wave in group.waves] == [4000]


def test_other_tasks_know_nothing_of_it(planned: Planned) -> None:
    unit = one(planned(task="rows"))
    assert "probes" not in unit.identity
    assert n_train_of(unit) == 0
    both = planned(task=["rows", "probing"], shots=[1])
    assert unit.id in {other.id for other in both.units}


def test_the_last_block_matters_to_the_embedding_alone(planned: Planned) -> None:
    assert one(planned(last_block="cls")).id == one(planned()).id
    embedding = one(planned(option="probing.feature=embedding", last_block="cls"))
    assert embedding.id != one(planned(option="probing.feature=embedding")).id
    assert embedding.identity["last_block"] == "cls"


def test_shots_stand_beside_the_full_probes(planned: Planned) -> None:
    found = planned(shots=[1, 5], task=["rows", "probing"]).units
    assert [u.options.get("shots") for u in found] == [None, "full", "1", "5"]
    _, full, first, fifth = found
    assert full.id == one(planned()).id
    assert fifth.id == one(planned(option="probing.shots=5")).id
    assert n_train_of(first) == 2 * 48
    again = planned(shots=[5, 5], option="probing.shots=05").units
    assert [u.id for u in again] == [fifth.id]
    assert [u.options["shots"] for u in planned(shots=5, option="probing.shots=2").units] == [
        "2",
        "5",
    ]


@pytest.mark.parametrize("said", ["0", "-1", "some", "1.5", "FULL", "²"])
def test_shots_that_are_none(planned: Planned, said: str) -> None:
    with pytest.raises(UsageError, match=r"(?s)probing\.shots=.*not a number.*full"):
        planned(option=f"probing.shots={said}")


def test_shots_that_no_run_can_have(planned: Planned) -> None:
    with pytest.raises(UsageError, match=r"(?s)--shots 0: it has to be 1 or more.*--shots 1 5 10"):
        planned(shots=[3, 0])
    with pytest.raises(UsageError, match=r"(?s)none of these does: rows.*--task"):
        planned(task="rows", shots=[1])
    with pytest.raises(SpecError, match="valid integer"):
        config_of(shots=["one"])
    assert config_of(shots=np.array([1, 5])).shots == (1, 5)
    assert config_of(shots=None).shots == ()


def test_shots_that_are_no_number_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--shots", "abc"])
    assert "--shots 1 5 10" in capsys.readouterr().err


def test_units_that_failed_can_be_told_apart(planned: Planned) -> None:
    said = ["probing.solver=ridge", "probing.label=family"]
    plan = planned(option=said, shots=[5], sae="small/a")
    start = "small · small/a · probing · shapes · label=family"
    assert {unit.label.removeprefix(start) for unit in plan.units} == {
        " · solver=ridge",
        " · shots=5 · solver=ridge",
    }
    assert one(planned(task="rows", sae="small/a")).label == "small · small/a · rows · shapes"


@pytest.mark.parametrize("lacking", [("shots",), ("feature", "label", "shots", "solver")])
def test_a_task_of_probes_without_their_options(tmp_path: Path, lacking: Sequence[str]) -> None:
    lines = PROBES.replace('"probing"', '"partly"').splitlines()
    kept = [line for line in lines if not any(f'"{name}": Option' in line for name in lacking)]
    write(tmp_path, {"tasks/partly.py": "\n".join(kept)})
    with pytest.raises(SpecError) as said:
        load_task(Registry.load([tmp_path]), "partly")
    assert f"needs probes has no option {' and none '.join(lacking)}" in said.value.what
    for name in ("feature", "label", "shots", "solver"):
        assert (f'"{name}": Option("' in said.value.hint) == (name in lacking)


def test_a_label_level_that_the_dataset_lacks(planned: Planned) -> None:
    with pytest.raises(UsageError, match=r"(?s)label=order.*'shapes'.*family, genus"):
        planned(option="probing.label=order")
    with pytest.raises(UsageError, match=r"(?s)label=family.*'digits'.*its levels: digit;"):
        planned(option="probing.label=family", dataset="digits")
    with pytest.raises(UsageError, match="main label alone"):
        planned(without_levels, option="probing.label=family")


def test_the_level_that_is_the_main_label_is_the_default(planned: Planned) -> None:
    named = one(planned(option="probing.label=species"))
    assert named.options["label"] == ""
    assert named.id == one(planned()).id


def without_levels(source: Source) -> Source:
    class WithoutLevels:
        label_names: ClassVar[dict[str, tuple[str, ...]]] = {}

    return replace(source, dataset=WithoutLevels())  # type: ignore[arg-type]


def of_one_class(source: Source) -> Source:
    assert source.dataset is not None
    dataset = source.dataset

    class OneClass:
        label_names = dataset.label_names
        class_names = dataset.class_names

        def manifest(self, split: str) -> Manifest:
            found = dataset.manifest(split)
            return replace(found, labels=np.zeros_like(found.labels))

    return replace(source, dataset=OneClass())  # type: ignore[arg-type]


def long(source: Source) -> Source:
    return replace(source, n_full=2**15 + 1)


@pytest.mark.parametrize("change", [of_one_class, long])
def test_what_nobody_asked_for_is_passed_over_and_the_run_is_well(
    planned: Planned, change: Callable[[Source], Source]
) -> None:
    plan = planned(change, task=())
    assert not plan.refused
    assert {unit.task.name for unit in plan.units} >= {"rows"}
    assert "probing" not in {unit.task.name for unit in plan.units}
    found = next(one for one in plan.passed_over if "probing" in one.name)
    assert found.name.endswith("· probing")


@pytest.mark.parametrize(
    "asked",
    [{"task": ["probing"]}, {"suite": "full"}, {"shots": [1]}, {"option": "probing.solver=ridge"}],
)
def test_a_long_pass_is_made_for_who_asks(planned: Planned, asked: dict[str, Any]) -> None:
    plan = planned(long, **{"task": (), **asked})
    assert "probing" in {unit.task.name for unit in plan.units}
    assert "probing" not in {one.name.split(" · ")[-1] for one in plan.passed_over}


def test_a_stream_of_which_nobody_said_how_much_is_refused_and_the_others_go_on(
    planned: Planned,
) -> None:
    def first(source: Source) -> Source:
        return replace(source, first_alone=True)

    plan = planned(first, task=["probing", "rows"])
    (refusal,) = plan.refused
    assert "are a stream, of which the first 2,048 are here" in str(refusal.error)
    assert "--train-limit N" in str(refusal.error)
    assert {unit.task.name for unit in plan.units} == {"rows"}


def test_a_dataset_of_one_class_is_refused_and_the_others_go_on(planned: Planned) -> None:
    plan = planned(of_one_class, task=["rows", "probing"])
    assert [unit.task.name for unit in plan.units] == ["rows"]
    (refusal,) = plan.refused
    assert refusal.name == "shapes · probing"
    assert "all of one class" in str(refusal.error)
    by_family = planned(of_one_class, option="probing.label=family")
    assert [unit.options["label"] for unit in by_family.units] == ["family"]


def test_a_long_pass_over_train_images_comes_last(planned: Planned) -> None:
    options = {"task": ["probing", "rows"], "sae": ["identity", "small/a"], "shots": [1]}
    (group,) = planned(long, **options).groups
    waves = [[(u.task.name, u.options.get("shots")) for u in w.units] for w in group.waves]
    early = [("probing", "1"), ("rows", None)]
    assert waves == [early * 2, [("probing", "full")] * 2]
    (group,) = planned(**options).groups
    assert len(group.waves) == 1
    assert len(group.waves[0].units) == 6


def test_none_is_twice_in_a_run(planned: Planned) -> None:
    found = planned(long, sae=["identity", "small/a"], shots=[1, 2], option="probing.shots=2")
    assert len({unit.id for unit in found.units}) == len(found.units) == len(found.todo) == 4
