"""The files that say what an SAE's weights mean: found, checked, and part of what is measured."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.beside import beside_paths, beside_sha256, beside_wanted, statistics_path, usual
from saebench.errors import SpecError, WeightsError
from saebench.formats.statistics import write_statistics
from saebench.registry import Registry
from saebench.specs import SaeSpec, WeightsSpec
from saebench.units import coder_identity
from tests.hub_stand_in import HubStandIn
from tests.hub_stand_in import hub as hub
from tests.small import add_sae, random_sae


def entry(folder: Path, *, semantics: dict[str, Any] | None = None, **weights: Any) -> SaeSpec:
    return SaeSpec(
        name="mine",
        path=str(folder / "mine.toml"),
        backbone="b",
        site="s",
        weights=WeightsSpec(**({"file": "sae.pt"} | weights)),
        semantics=semantics or {},
    )


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_usual_names_beside_a_file(tmp_path: Path) -> None:
    for name in ("cfg.json", "config.yaml", "notes.txt", "sae.arch_ref", "other.arch_ref"):
        (tmp_path / name).write_text("{}")
    found = usual(tmp_path / "sae.pt")
    assert found == {n: tmp_path / n for n in ("cfg.json", "config.yaml", "sae.arch_ref")}


def test_the_configuration_of_a_folder_of_checkpoints_lies_above(tmp_path: Path) -> None:
    inside = tmp_path / "checkpoints"
    inside.mkdir()
    (tmp_path / "config.json").write_text("{}")
    found = usual(inside / "ae_100.pt")
    assert set(found) == {"config.json"}
    assert found["config.json"].samefile(tmp_path / "config.json")
    (inside / "config.json").write_text("{}")
    assert usual(inside / "ae_100.pt")["config.json"] == inside / "config.json"
    other = tmp_path / "weights"
    other.mkdir()
    assert usual(other / "ae_100.pt") == {}


def test_declared_names_are_those_and_no_others(tmp_path: Path) -> None:
    for name in ("cfg.json", "config.json"):
        (tmp_path / name).write_text("{}")
    spec = entry(tmp_path, beside={"cfg.json": sha256("{}")})
    assert beside_paths(spec, tmp_path / "sae.pt") == {"cfg.json": tmp_path / "cfg.json"}
    assert beside_sha256(spec) == {"cfg.json": sha256("{}")}


def test_one_folder_up_and_no_further(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "steps"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    spec = entry(folder, beside={"../config.json": ""})
    path = beside_paths(spec, folder / "sae.pt")["config.json"]
    assert path.samefile(tmp_path / "run" / "config.json")
    for name in ("../../config.json", "/etc/passwd", "a/../../b.json", "a//b", "..\\b", "x/.."):
        with pytest.raises(SpecError, match="not beside the weights"):
            beside_paths(entry(folder, beside={name: ""}), folder / "sae.pt")


def test_missing_and_altered_files(tmp_path: Path) -> None:
    spec = entry(tmp_path, beside={"cfg.json": sha256("{}")})
    with pytest.raises(WeightsError, match=r"'cfg.json' is not beside the weights"):
        beside_paths(spec, tmp_path / "sae.pt")
    (tmp_path / "cfg.json").write_text('{"k": 3}')
    with pytest.raises(WeightsError, match=r"is not the file that .*mine.toml describes"):
        beside_paths(spec, tmp_path / "sae.pt")


def test_a_configuration_is_part_of_what_is_measured(tmp_path: Path) -> None:
    weights = add_sae(tmp_path, "a", random_sae())
    (tmp_path / "registry/backbones").mkdir(parents=True)

    def identity() -> dict[str, Any]:
        from saebench.coders import CoderRef

        registry = Registry.load([tmp_path])
        return coder_identity(registry, CoderRef("small/a", "s", "all", registry.sae("small/a")))

    without = identity()
    assert "beside" not in without["saes"][0]
    (weights.parent / "config.json").write_text('{"k": 3}')
    first = identity()
    assert first["saes"][0]["beside"] == {"config.json": sha256('{"k": 3}')}
    (weights.parent / "config.json").write_text('{"k": 4}')
    assert identity() != first


def test_statistics_are_part_of_what_is_measured(tmp_path: Path) -> None:
    (tmp_path / "sae.pt").write_bytes(b"x")
    spec = entry(tmp_path, semantics={"statistics": "s.safetensors"})

    def identity(std: float, **origin: str) -> dict[str, str]:
        facts = {"input_std": torch.tensor(std)}
        write_statistics(tmp_path / "s.safetensors", facts, {"input_std": origin})
        return beside_sha256(spec)

    first = identity(2.0, images="64")
    assert statistics_path(spec) == tmp_path / "s.safetensors"
    assert list(first) == ["statistics"]
    assert identity(2.0, images="640", saebench_version="0") == first
    assert identity(2.5, images="64") != first
    with pytest.raises(WeightsError, match="is not there"):
        statistics_path(entry(tmp_path, semantics={"statistics": "none.safetensors"}))
    with pytest.raises(SpecError, match="name of a file"):
        statistics_path(entry(tmp_path, semantics={"statistics": 3}))


def test_what_a_statistics_file_is_called_measures_nothing_anew(tmp_path: Path) -> None:
    from saebench.coders import CoderRef

    def identity(name: str) -> dict[str, Any]:
        add_sae(tmp_path, "a", random_sae())
        folder = tmp_path / "registry/saes/small"
        write_statistics(folder / name, {"threshold": torch.tensor(0.5)}, {"threshold": {}})
        with (folder / "a.toml").open("a") as file:
            file.write(f'\n[semantics]\nstatistics = "{name}"\n')
        registry = Registry.load([tmp_path])
        return coder_identity(registry, CoderRef("small/a", "s", "all", registry.sae("small/a")))

    first = identity("one.safetensors")
    assert "statistics" in first["saes"][0]["beside"]
    assert identity("other.safetensors") == first


def test_two_names_of_one_configuration(tmp_path: Path) -> None:
    spec = entry(tmp_path, beside={"config.json": "0" * 64, "../config.json": "1" * 64})
    on_hub = replace(spec, weights=replace(spec.weights, file=None, hub="a/b", filename="l/s.pt"))
    said = r"mine\.toml: 'config\.json' and '\.\./config\.json' .* are both its config\.json"
    with pytest.raises(SpecError, match=said):
        beside_paths(spec, tmp_path / "sae.pt")
    with pytest.raises(SpecError, match=said):
        beside_sha256(spec)
    with pytest.raises(SpecError, match=said):
        beside_wanted(on_hub)


def test_of_a_hub_at_the_commit_of_the_weights(tmp_path: Path, hub: HubStandIn) -> None:
    files = {"l8/sae.pt": b"weights" * 100, "l8/cfg.json": b"{}", "config.json": b"[]"}
    first = hub.commit("someone/saes", files)
    spec = entry(
        tmp_path,
        file=None,
        hub="someone/saes",
        filename="l8/sae.pt",
        beside={"cfg.json": "", "../config.json": ""},
    )
    asked = {name: file.names for name, file in beside_wanted(spec).items()}
    assert asked == {"cfg.json": ("l8/cfg.json",), "../config.json": ("config.json",)}
    assert beside_sha256(spec) == {"cfg.json": sha256("{}"), "config.json": sha256("[]")}
    hub.commit("someone/saes", {**files, "l8/cfg.json": b'{"moved": 1}'})
    paths = beside_paths(spec, tmp_path / "unused")
    assert first in str(paths["cfg.json"])
    assert {name: path.read_bytes() for name, path in paths.items()} == {
        "cfg.json": b"{}",
        "config.json": b"[]",
    }


def test_of_a_hub_with_another_hash_than_declared(tmp_path: Path, hub: HubStandIn) -> None:
    hub.commit("someone/saes", {"sae.pt": b"weights", "cfg.json": b"{}"})
    spec = entry(
        tmp_path, file=None, hub="someone/saes", filename="sae.pt", beside={"cfg.json": sha256("")}
    )
    with pytest.raises(WeightsError, match="sha256"):
        beside_paths(spec, tmp_path / "unused")
