"""Make the SAEs in `registry/saes/` again: `python -m recipes.embedded_saes [BACKBONE ...]`.

The same recipe on every embedded backbone, at its default site and over all its tokens, on the
train split of `shapes`: TopK at three sparsities. On tiny-vit also every other architecture at the
middle one, and two further seeds. One core takes about a minute for a backbone, three for tiny-vit.
Nothing is done for what is there already; `--overwrite` makes it again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from saebench import paths
from saebench.train import TrainConfig, train_with_progress

BACKBONES = ("tiny-clip", "tiny-dinov2", "tiny-vit", "tiny-resnet", "tiny-bioclip")
SPARSITIES = (4, 8, 16)
MIDDLE = 8


def calls(backbone: str, out: Path, *, overwrite: bool = False) -> list[TrainConfig]:
    """The calls of `saebench train` that make a backbone's SAEs."""

    def call(**fields: object) -> TrainConfig:
        common: dict[str, object] = {
            "backbone": backbone,
            "dataset": ("shapes",),
            "expansion": 6.0,  # 384 latents on 64 dimensions
            "steps": 4000,
            "batch_rows": 256,
            "lr": 4e-3,  # three times the default: short training, found best at this length
            "save_dtype": "float16",
            "device": "cpu",
            "licence": "Apache-2.0",
            "out": str(out),
            "overwrite": overwrite,
        }
        return TrainConfig(**{**common, **fields})  # type: ignore[arg-type]

    made = [call(arch=("topk",), k=SPARSITIES)]
    if backbone == "tiny-vit":
        made.append(call(arch=("topk",), k=(MIDDLE,), seed=(1, 2)))
        others = ("relu", "batchtopk", "jumprelu", "gated", "matryoshka-batchtopk")
        made.append(call(arch=others, k=(MIDDLE,)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m recipes.embedded_saes")
    parser.add_argument("backbone", nargs="*", default=BACKBONES, help="by default all")
    parser.add_argument("--overwrite", action="store_true", help="make again what is there")
    parser.add_argument("--threads", type=int, default=1, help="of torch; bits depend on it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for backbone in arguments.backbone:
        for config in calls(backbone, paths.CONTENT, overwrite=arguments.overwrite):
            train_with_progress(config, Console())


if __name__ == "__main__":
    main()
