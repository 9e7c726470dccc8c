"""Make one embedded backbone again: `python -m recipes.backbones NAME --out DIR`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from recipes.backbones import contrastive, distilled, entries, measure, supervised
from recipes.backbones.optimise import Schedule
from saebench.specs import BackboneSpec


def _vit(spec: BackboneSpec, generator: torch.Generator) -> nn.Module:
    return supervised.train(spec, Schedule(epochs=36, rate=2e-3), generator)


def _resnet(spec: BackboneSpec, generator: torch.Generator) -> nn.Module:
    return supervised.train(spec, Schedule(epochs=30, rate=4e-3), generator)


def _dinov2(spec: BackboneSpec, generator: torch.Generator) -> nn.Module:
    return distilled.train(spec, Schedule(epochs=12, rate=1.5e-3), generator)


def _clip(spec: BackboneSpec, generator: torch.Generator) -> nn.Module:
    return contrastive.train(spec, Schedule(epochs=25, rate=2e-3), generator)


def _bioclip(spec: BackboneSpec, generator: torch.Generator) -> nn.Module:
    assert spec.base
    base = entries.load(entries.spec_of(spec.base))
    return contrastive.fine_tune(spec, base, Schedule(epochs=15, rate=5e-4), generator)


RECIPES: dict[str, Callable[[BackboneSpec, torch.Generator], nn.Module]] = {
    "tiny-resnet": _resnet,
    "tiny-vit": _vit,
    "tiny-dinov2": _dinov2,
    "tiny-clip": _clip,
    "tiny-bioclip": _bioclip,
}


def make(name: str, out: Path) -> tuple[Path, str]:
    """Train `name` and store it in float16 below `out`; return the file and its SHA-256."""
    spec = entries.spec_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(entries.SEED)
        model = RECIPES[name](spec, torch.Generator().manual_seed(entries.SEED))
    path = out / name / entries.weights_of(spec).name
    return path, entries.store(model, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.backbones", description=__doc__)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write NAME/ to")
    arguments = parser.parse_args()
    start = time.perf_counter()
    path, sha256 = make(arguments.name, arguments.out)
    seconds = round(time.perf_counter() - start)
    print(json.dumps({"file": str(path), "sha256": sha256, "seconds": seconds}, indent=2))
    spec = entries.spec_of(arguments.name)
    print(json.dumps(measure.everything(spec, entries.load(spec, path)), indent=2))


if __name__ == "__main__":
    main()
