"""Weights files: the right one loads, and whatever is wrong with another is said."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saebench.backbones import load_backbone
from saebench.errors import SpecError, WeightsError
from saebench.specs import BackboneSpec, WeightsSpec
from tests.backbone_cases import CASES, images, spec_of
from tests.hub_stand_in import HubStandIn
from tests.hub_stand_in import hub as hub


@pytest.fixture
def spec(tmp_path: Path) -> BackboneSpec:
    return spec_of(CASES["vit"], tmp_path)


@pytest.fixture
def file(spec: BackboneSpec) -> Path:
    return Path(spec.path).parent / "model.safetensors"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def with_weights(spec: BackboneSpec, **fields: Any) -> BackboneSpec:
    return replace(spec, weights=WeightsSpec(**fields))


def test_a_relative_file_lies_beside_the_entry(
    spec: BackboneSpec, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    backbone = load_backbone(with_weights(spec, file="model.safetensors", sha256=sha256(file)))
    assert backbone.weights_sha256 == sha256(file)
    assert load_backbone(spec).weights_sha256 == sha256(file)
    loaded = backbone.model.module.state_dict()
    assert all(torch.equal(loaded[name], wanted) for name, wanted in load_file(file).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_whatever_floats_are_stored_they_become_float32(
    dtype: torch.dtype, spec: BackboneSpec, file: Path
) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(stored, file)
    loaded = load_backbone(spec).model.module.state_dict()
    for name, tensor in stored.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.float())


def test_integer_buffers_stay_integers(tmp_path: Path) -> None:
    backbone = load_backbone(spec_of(CASES["resnet10t"], tmp_path))
    assert backbone.model.module.state_dict()["bn1.num_batches_tracked"].dtype == torch.int64


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _truncate_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def _pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _page(path: Path) -> None:
    path.write_text("\n<!DOCTYPE html><html>Sign in</html>")


def _pickle(path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, path)


def _old_pickle(path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (_truncate, "cannot be read as safetensors.*truncated"),
    (_truncate_header, "cannot be read as safetensors.*truncated"),
    (_pointer, "is a Git LFS pointer.*git lfs pull"),
    (_page, "is a web page.*raw file"),
    (_pickle, r"does not fit the model: the file lacks cls_token"),
    (_old_pickle, r"does not fit the model: the file lacks cls_token"),
    (lambda path: path.write_bytes(b""), "is empty.*get it again"),
    (lambda path: path.unlink(), "is not there"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_file_that_is_not_the_weights_says_what_it_is(
    damage: Callable[[Path], None], message: str, spec: BackboneSpec, file: Path
) -> None:
    damage(file)
    with pytest.raises(WeightsError, match=f"(?s){message}"):
        load_backbone(spec)


@pytest.mark.parametrize("damage", [_flip, _truncate])
def test_altered_bytes_are_seen_before_anything_is_parsed(
    damage: Callable[[Path], None],
    spec: BackboneSpec,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned = with_weights(spec, file=file.name, sha256=sha256(file))
    damage(file)
    monkeypatch.setattr("saebench.backbones.checkpoint.safe_open", None)
    with pytest.raises(WeightsError, match=r"(?s)is not the file that .*declared.*get it again"):
        load_backbone(pinned)


def test_nan_and_infinite_weights_are_named(spec: BackboneSpec, file: Path) -> None:
    tensors = load_file(file)
    tensors["norm.weight"][3] = float("nan")
    tensors["head.bias"][:2] = float("inf")
    save_file(tensors, file)
    with pytest.raises(WeightsError) as error:
        load_backbone(spec)
    assert "norm.weight (1 of 24)" in str(error.value)
    assert "head.bias (2 of 7)" in str(error.value)


def test_every_difference_from_the_model_is_named(spec: BackboneSpec, file: Path) -> None:
    tensors = load_file(file)
    del tensors["norm.weight"], tensors["norm.bias"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["head.weight"] = torch.zeros(5, 24)
    save_file(tensors, file)
    with pytest.raises(WeightsError) as error:
        load_backbone(spec)
    assert "the file lacks norm.weight, norm.bias" in str(error.value)
    assert "the model lacks extra.weight" in str(error.value)
    assert "head.weight (file [5, 24], model [7, 24])" in str(error.value)


def test_weights_of_another_depth_list_a_few_names_only(spec: BackboneSpec) -> None:
    deeper = replace(spec, model_args={**spec.model_args, "depth": 4})
    with pytest.raises(WeightsError, match=r"the file lacks blocks\.3\S+, \S+, \S+ and 9 more"):
        load_backbone(deeper)


def test_an_architecture_without_weights_is_refused(spec: BackboneSpec) -> None:
    with pytest.raises(SpecError, match="there are no weights"):
        load_backbone(with_weights(spec))


def test_a_folder_is_not_a_file(spec: BackboneSpec, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a folder"):
        load_backbone(with_weights(spec, file="."))


def test_a_file_and_a_hub_are_not_both(spec: BackboneSpec) -> None:
    with pytest.raises(SpecError, match=r"(?s)both there.*keep one of them"):
        load_backbone(with_weights(spec, hub="a/b", file="c"))


@pytest.mark.parametrize("declared", [True, False])
def test_hub_weights_give_the_same_outputs(
    declared: bool, spec: BackboneSpec, file: Path, hub: HubStandIn
) -> None:
    commit = hub.commit("timm/vit", {"model.safetensors": file.read_bytes()})
    fields: dict[str, Any] = {"hub": "timm/vit"}
    if declared:
        fields |= {"revision": commit, "filename": "model.safetensors", "sha256": sha256(file)}
    backbone = load_backbone(with_weights(spec, **fields))
    assert backbone.weights_sha256 == sha256(file)
    x = images()
    wanted = load_backbone(spec).forward(x).embedding_bd
    assert torch.equal(backbone.forward(x).embedding_bd, wanted)


def test_hub_weights_other_than_declared_are_never_loaded(
    spec: BackboneSpec, file: Path, hub: HubStandIn
) -> None:
    commit = hub.commit("timm/vit", {"model.safetensors": file.read_bytes()})
    fields = {"hub": "timm/vit", "revision": commit, "filename": "model.safetensors"}
    with pytest.raises(WeightsError, match=r"is not model\.safetensors of timm/vit"):
        load_backbone(with_weights(spec, **fields, sha256="0" * 64))
