"""Built-in entries load files of the true names, shapes and sizes of their releases.

The values are random: the library builds the very model that was released (its tag), and that is
what the hub serves. What comes must equal what the library itself makes of that file.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from saebench.backbones import build_module
from saebench.backbones.checkpoint import load_weights
from saebench.registry import Registry
from tests.hub_stand_in import HubStandIn
from tests.hub_stand_in import hub as hub

TIMM = [
    "deit-b16-distilled",
    "dinov2-vits14",
    "dinov2-vits14-reg",
    "dinov3-vits16",
    "resnet50-tv-v2",
    "vit-b16-augreg-in21k",
]
OPEN_CLIP = ["bioclip", "clip-rn50-openai"]


def released(hub: HubStandIn, name: str, path: Path, more: dict[str, bytes] | None = None) -> Any:
    """The entry, with the file that lies at `path` in its repository; and what it loads."""
    spec = Registry.load().backbone(name)
    assert spec.weights.hub is not None
    file = spec.weights.filename or path.name
    hub.commit(spec.weights.hub, {file: path.read_bytes(), **(more or {})})
    # The true files' commit and sha256 are not those of random values.
    spec = replace(spec, weights=replace(spec.weights, revision=None, sha256=None))
    module = build_module(spec)
    assert isinstance(module, nn.Module)
    load_weights(module, spec)
    return spec, module.state_dict()


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timms_releases(name: str, hub: HubStandIn, tmp_path: Path) -> None:
    tag = str(Registry.load().backbone(name).weights.hub).removeprefix("timm/")
    release = timm.create_model(tag)
    path = tmp_path / "model.safetensors"
    save_file(release.state_dict(), path)
    spec, found = released(hub, name, path)
    overlay = {"file": str(path), "custom_load": False}
    args: dict[str, Any] = dict(spec.model_args)
    upstream = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    assert_same(found, upstream.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clips_releases(name: str, hub: HubStandIn, tmp_path: Path) -> None:
    spec = Registry.load().backbone(name)
    model = "ViT-B-16" if name == "bioclip" else spec.model
    config = json.dumps({"model_cfg": open_clip.get_model_config(model), "preprocess_cfg": {}})
    release = open_clip.create_model(model)
    if (spec.weights.filename or "").endswith(".bin"):
        path = tmp_path / "open_clip_pytorch_model.bin"
        torch.save(release.state_dict(), path)
    else:
        path = tmp_path / "open_clip_model.safetensors"
        save_file(release.state_dict(), path)
    _, found = released(hub, name, path, {"open_clip_config.json": config.encode()})
    assert_same(found, open_clip.create_model(model, pretrained=str(path)).state_dict())
    assert_same(found, release.state_dict())
