from __future__ import annotations

from pathlib import Path

import pytest

from saebench.errors import SpecError
from saebench.runconfig import RunConfig
from saebench.specs import (
    BackboneSpec,
    DatasetSpec,
    SaeSpec,
    SiteSpec,
    WeightsSpec,
    semantic_fields,
)
from saebench.strict import parse_spec, read_spec, validated

SAE = {"backbone": "b", "site": "blocks.2", "weights": {"file": "x"}}
BACKBONE = {
    "family": "vit",
    "architecture": "vit",
    "pretraining": "supervised",
    "loader": "timm",
    "model": "m",
    "input": {"size": 32},
}


def sae(**changes: object) -> SaeSpec:
    return parse_spec(SaeSpec, {**SAE, **changes}, name="n", path="f.toml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenz": "all"}, "unknown key 'tokenz'\n  → did you mean 'tokens'?"),
        ({"weights": {"fil": "x"}}, "unknown key 'weights.fil'\n  → did you mean 'file'?"),
        ({"zzz": 1}, "valid keys: backbone, site"),
        ({"seed": "1"}, "'seed': Input should be a valid integer, got '1'"),
        ({"seed": 1.5}, "'seed'"),
        ({"backbone": ["b"]}, "'backbone'"),
        ({"weights": None}, "'weights'"),
        ({"name": "n"}, "'name' is not written in an entry"),
    ],
)
def test_a_wrong_entry_names_file_key_and_nearest(changes: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError) as error:
        sae(**changes)
    assert str(error.value).startswith("f.toml")
    assert said in str(error.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(SpecError, match=r"f\.toml: the key 'site' is missing"):
        parse_spec(SaeSpec, {"backbone": "b", "weights": {}}, name="n", path="f.toml")


def test_a_site_of_the_wrong_type_is_named_by_its_path() -> None:
    sites = {"blocks.1": {"path": "blocks.1", "width": "64"}}
    with pytest.raises(SpecError, match=r"'sites\.blocks\.1\.width'"):
        parse_spec(BackboneSpec, {**BACKBONE, "sites": sites}, name="n", path="f.toml")


def test_an_unknown_key_of_a_site_gets_the_nearest_key_of_a_site() -> None:
    sites = {"blocks.1": {"path": "blocks.1", "width": 64, "register": 4}}
    with pytest.raises(SpecError, match="did you mean 'registers'"):
        parse_spec(BackboneSpec, {**BACKBONE, "sites": sites}, name="n", path="f.toml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"l0": float("nan")}, "NaN and infinity"),
        ({"semantics": {"threshold": float("inf")}}, "NaN and infinity"),
        ({"l0": -3.0}, "above 0"),
    ],
)
def test_numbers_that_an_entry_cannot_have(changes: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        sae(**changes)


@pytest.mark.parametrize(
    "pixels", [{"size": 0}, {"size": 32, "std": [0.0, 1.0, 1.0]}, {"size": 32, "resize_to": 0}]
)
def test_pixels_that_cannot_be(pixels: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=r"f\.toml: 'input'"):
        parse_spec(BackboneSpec, {**BACKBONE, "input": pixels}, name="n", path="f.toml")


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({"path": "p", "width": 8}, "it has no tokens"),
        ({"path": "p", "width": 8, "layout": "map"}, "a map needs its grid"),
        ({"path": "p", "width": 0, "cls": 1}, "width is 1 or more"),
        ({"path": "p", "width": 8, "cls": -1}, "never negative"),
        ({"path": "p", "width": 8, "grid": [0, 4]}, "each 1 or more"),
    ],
)
def test_sites_that_cannot_be(site: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_spec(BackboneSpec, {**BACKBONE, "sites": {"a": site}}, name="n", path="f.toml")


def test_a_dataset_is_not_fitted_on_what_it_measures() -> None:
    raw = {"source": "shapes", "train": "test"}
    with pytest.raises(SpecError, match="one split"):
        parse_spec(DatasetSpec, raw, name="n", path="f.toml")


@pytest.mark.parametrize("text", ["a = ", "\x00", "a = 1\na = 2"])
def test_a_file_that_is_not_toml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(SpecError, match="is not valid TOML"):
        read_spec(SaeSpec, path, "x")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read"):
        read_spec(SaeSpec, path, "x")


def test_a_date_has_no_place(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('backbone = "b"\nsite = "s"\ntrained_on = 2024-01-01\n[weights]\n')
    with pytest.raises(SpecError, match="use text, numbers, true and false"):
        read_spec(SaeSpec, path, "x")


def test_semantic_fields_are_those_that_change_numbers() -> None:
    plain = sae()
    documented = sae(description="d", licence="MIT", paper="p", recipe="r", l0=3.0)
    assert semantic_fields(plain) == semantic_fields(documented)
    assert semantic_fields(plain) != semantic_fields(sae(tokens="cls"))
    moved = sae(weights={"file": "elsewhere"})
    assert semantic_fields(plain) == semantic_fields(moved)
    assert semantic_fields(plain) != semantic_fields(sae(weights={"sha256": "0"}))


def test_token_layouts() -> None:
    dinov2 = SiteSpec(path="p", width=8, cls=1, registers=4, grid=(2, 3))
    assert dinov2.kinds == {"cls": slice(0, 1), "registers": slice(1, 5), "patches": slice(5, 11)}
    assert dinov2.tokens == 11
    siglip = SiteSpec(path="p", width=8, grid=(2, 2))
    assert siglip.kinds == {"patches": slice(0, 4)}
    deit = SiteSpec(path="p", width=8, cls=1, distillation=1, grid=(1, 1))
    assert list(deit.kinds) == ["cls", "distillation", "patches"]
    conv = SiteSpec(path="p", width=8, layout="map", grid=(7, 7))
    assert conv.kinds == {"grid": slice(0, 49)}
    pooled = SiteSpec(path="p", width=8, layout="pooled")
    assert pooled.kinds == {"pooled": slice(0, 1)}


def test_a_run_config_is_strict_too() -> None:
    config = validated(RunConfig, {"backbone": ["a"], "limit": 3}, where="here")
    assert config.backbone == ("a",)
    assert config.limit == 3
    with pytest.raises(SpecError, match="here: unknown key 'limt'\n  → did you mean 'limit'"):
        validated(RunConfig, {"limt": 3}, where="here")
    with pytest.raises(SpecError, match="'dtype'"):
        validated(RunConfig, {"dtype": "float8"}, where="here")


def test_specs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        WeightsSpec().file = "x"  # type: ignore[misc]
