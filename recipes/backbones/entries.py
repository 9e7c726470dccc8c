"""The registry's entries as models: built fresh, loaded, stored."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from recipes.backbones import contrastive, supervised
from saebench.paths import CONTENT
from saebench.specs import BackboneSpec
from saebench.strict import read_spec

SEED = 0


def spec_of(name: str) -> BackboneSpec:
    """The registry's entry."""
    return read_spec(BackboneSpec, CONTENT / f"registry/backbones/{name}.toml", name)


def weights_of(spec: BackboneSpec) -> Path:
    """Where the entry's weights are."""
    assert spec.weights.file, "an embedded backbone has its weights beside its entry"
    return Path(spec.path).parent / spec.weights.file


def fresh(spec: BackboneSpec) -> nn.Module:
    """The entry's architecture with random weights, in evaluation mode."""
    # Constructors of timm and open_clip draw from the global generator: seed it, and put it back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        build = contrastive.build if spec.loader == "open_clip" else supervised.build
        return build(spec).eval()


def load(spec: BackboneSpec, path: Path | None = None) -> nn.Module:
    """The entry's model with the weights in `path`, else its own; float32, in evaluation mode."""
    model = fresh(spec)
    # load_state_dict copies float16 values into the model's float32 parameters.
    model.load_state_dict(load_file(path or weights_of(spec)))
    return model


def store(model: nn.Module, path: Path) -> str:
    """Write the weights, rounded to float16; return the file's SHA-256."""
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()
