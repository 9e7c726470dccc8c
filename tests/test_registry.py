from __future__ import annotations

from pathlib import Path

import pytest

from saebench import paths
from saebench.errors import NotFound, SpecError, UsageError
from saebench.registry import Registry
from saebench.taskfiles import describe, load_task
from tests.content import BACKBONE, TASK, sae_entry, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(
        tmp_path / "mine",
        {
            "registry/backbones/small.toml": BACKBONE,
            "registry/saes/small/a.toml": sae_entry(),
            "registry/saes/small/b.toml": sae_entry(tokens="cls"),
            "tasks/rows.py": TASK,
        },
    )


def test_a_users_folder_comes_before_the_built_in_one(folder: Path) -> None:
    registry = Registry.load([folder])
    assert "small" in registry.backbones
    assert registry.backbones.origin("small").label == str(folder)
    assert registry.backbones.origin("tiny-vit").label == "built-in"
    assert registry.sae("small/b").tokens == "cls"
    assert registry.saes.match(["small/*"]) == ["small/a", "small/b"]


def test_a_bare_registry_folder_serves_too(folder: Path) -> None:
    assert "small" in Registry.load([folder / "registry"]).backbones


def test_saebench_path_and_configuration_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBENCH_PATH", str(folder))
    assert "small" in Registry.load().backbones
    monkeypatch.delenv("SAEBENCH_PATH")
    monkeypatch.setenv("SAEBENCH_CONFIG", str(folder))
    assert Registry.load().backbones.origin("small").label == "user"


def test_unknown_names_get_the_nearest_three_and_where_it_looked(folder: Path) -> None:
    with pytest.raises(NotFound) as error:
        Registry.load([folder]).backbone("tiny-vut")
    said = str(error.value)
    assert "did you mean tiny-vit" in said
    assert said.count("tiny-") <= 4
    assert str(folder / "registry" / "backbones") in said
    assert str(paths.CONTENT) in said
    assert error.value.exit_code == 2


def test_case_does_not_hide_the_nearest_name() -> None:
    with pytest.raises(NotFound, match="did you mean tiny-vit"):
        Registry.load().backbone("TINY-VIT")


def test_a_pattern_without_a_match() -> None:
    with pytest.raises(NotFound, match=r"'nothing-\*'"):
        Registry.load().backbones.match(["nothing-*"])


def test_a_name_twice_is_an_error_that_names_both(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", {"registry/backbones/small.toml": BACKBONE})
    with pytest.raises(SpecError) as error:
        Registry.load([folder, other]).backbone("small")
    assert str(folder / "registry/backbones/small.toml") in str(error.value)
    assert str(other / "registry/backbones/small.toml") in str(error.value)


def test_a_name_twice_is_meant_when_the_stronger_says_so(folder: Path, tmp_path: Path) -> None:
    replacing = f'replaces = "{folder}"\n' + BACKBONE.replace('"none"', '"mine"')
    other = write(tmp_path / "other", {"registry/backbones/small.toml": replacing})
    assert Registry.load([other, folder]).backbone("small").pretraining == "mine"


def test_a_typed_folder_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        Registry.load([tmp_path / "absent"])
    monkeypatch.setenv("SAEBENCH_PATH", str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="SAEBENCH_PATH"):
        Registry.load()


def test_a_task_is_described_without_being_run(folder: Path) -> None:
    marker = folder / "ran"
    path = folder / "tasks" / "rows.py"
    path.write_text(TASK + f"\nopen({str(marker)!r}, 'w').close()\n")
    registry = Registry.load([folder])
    task = describe(registry, "rows")
    assert task.title == "Counts the rows."
    assert task.metrics == ("rows",)
    assert not marker.exists()
    load_task(registry, "rows")
    assert marker.exists()


def test_a_task_file_is_loaded_once(folder: Path) -> None:
    registry = Registry.load([folder])
    assert load_task(registry, "rows") is load_task(Registry.load([folder]), "rows")


def test_code_from_an_untrusted_folder_does_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBENCH_PATH", str(folder))
    with pytest.raises(UsageError, match="not trusted"):
        load_task(Registry.load(), "rows")
    config = write(tmp_path / "config", {"config.toml": f'trusted = ["{folder}"]'})
    monkeypatch.setenv("SAEBENCH_CONFIG", str(config))
    assert load_task(Registry.load(), "rows").name == "rows"


@pytest.mark.parametrize("text", ["trusted = 1", "trust = []", "trusted = [", "trusted = [1]"])
def test_a_wrong_configuration_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    config = write(tmp_path / "config", {"config.toml": text})
    monkeypatch.setenv("SAEBENCH_CONFIG", str(config))
    monkeypatch.setenv("SAEBENCH_PATH", str(config))
    with pytest.raises(SpecError, match=r"config\.toml"):
        Registry.load()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "0 task classes"),
        (TASK + TASK.replace("class Rows", "class More"), "2 task classes"),
        (TASK.replace('name = "rows"', 'name = "other"'), 'write  name = "rows"'),
        ("import nothing_like_it", "does not import"),
        ("class (", "does not import"),
    ],
)
def test_a_file_that_is_not_one_task(tmp_path: Path, text: str, said: str) -> None:
    root = write(tmp_path / "c", {"tasks/rows.py": text})
    with pytest.raises(SpecError, match=said):
        load_task(Registry.load([root]), "rows")


def test_names_are_listed_without_parsing_entries(tmp_path: Path) -> None:
    # Not a timing test: names alone must not parse files, so broken ones do no harm.
    root = write(tmp_path / "c", {f"registry/saes/x/{i}.toml": "broken" for i in range(1000)})
    registry = Registry.load([root])
    assert len(registry.saes.match(["x/*"])) == 1000
