"""What one call of `saebench train` trains, and the recipes that follow from it. No torch here."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import product
from typing import Literal

from saebench.errors import UsageError
from saebench.train.recipe import PENALISED, Arch, Recipe

REFERENCE_RATE = 2e-4  # Adam's learning rate at 2^14 latents; it falls with √s (Gao et al. 2024)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train SAEs on one backbone, site and token set, all of them in one pass over activations.

    Every architecture is trained at every sparsity and every seed that is given. The same command
    again goes on from the last checkpoint, and does nothing for what is finished.
    """

    backbone: str = ""  # name of a backbone's entry; with `on`, by default the one of that SAE
    site: str = ""  # one of its sites; by default the entry's own
    tokens: str = "all"  # all, a token kind (cls, registers, patches, grid), or kinds joined by +
    on: str = ""  # sae:NAME trains on the dense codes of that SAE: an SAE on an SAE
    init: str = ""  # start from this SAE: a name, or the path of an entry or a weights file
    dataset: tuple[str, ...] = ()  # whose train splits are used; by default the backbone's
    train_limit: int | None = None  # first n images of each train split

    arch: tuple[Arch, ...] = ()  # by default topk, or that of `init`
    k: tuple[int, ...] = ()  # sparsities of the TopK family; by default 32, or that of `init`
    l0: tuple[float, ...] = ()  # target L0 of relu, jumprelu and gated; by default those of `k`
    d_sae: int | None = None  # latents; by default `expansion` times the width
    expansion: float = 8.0  # latents for each dimension of the site
    seed: tuple[int, ...] = (0,)  # of the start; the order of the rows is the same for all

    steps: int = 5_000  # of the optimiser
    batch_rows: int = 1_024  # rows a step; 4096 is usual for a ViT-B
    lr: float | None = None  # by default 2e-4·√(16384 / d_sae)
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    decay: float = 0.3  # share of the steps, the last ones, in which it falls to 0
    clip: float = 1.0  # largest norm of the gradient
    b_dec: Literal["mean", "geometric-median"] = "mean"  # where the decoder's bias starts
    dead_after: int | None = None  # silent rows of a dead latent; by default 200·d_sae / L0
    penalty: Literal["step", "tanh"] = "step"  # of jumprelu

    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    batch_size: int = 64  # images through the backbone at once
    workers: int | None = None  # processes that decode images; 0 decodes in this one; none: chosen
    data_root: str | None = None  # the folder of datasets, by name; none: $SAEBENCH_DATA
    bad_images: Literal["fail", "skip"] = "fail"  # what to do with an image that does not decode
    memory: str = "4GiB"  # for activations; what does not fit is shuffled in windows of this size

    name: str = ""  # of the entry, below the backbone's folder; a prefix when there are several
    out: str = "trained"  # a content folder: entries go to <out>/saes/<backbone>/
    registry: tuple[str, ...] = ()  # folders searched before all others
    save_dtype: Literal["float32", "float16"] = "float32"  # of the weights file
    licence: str = ""  # of the weights, written into the entry
    overwrite: bool = False  # replace entries of the same name made in another way
    checkpoint_minutes: float = 5.0  # between two checkpoints; 0 writes one after every step


@dataclass(frozen=True)
class Start:
    """What an SAE to start from decides: architecture, k, latents, and the hash of its weights."""

    arch: Arch
    k: int | None
    d_sae: int
    sha256: str


def recipes(config: TrainConfig, d_model: int, start: Start | None = None) -> list[Recipe]:
    """The SAEs of a call: architectures x sparsities x seeds.

    Errors: UsageError for values that cannot be trained, or that `init` contradicts.
    """
    archs = config.arch or ((start.arch,) if start else ("topk",))
    d_sae = config.d_sae or (start.d_sae if start else round(config.expansion * d_model))
    _check_numbers(config, d_sae)
    if start:
        _check_start(config, start, archs, d_sae)
    k = config.k or tuple(round(value) for value in config.l0)
    k = k or ((start.k,) if start and start.k else (32,))
    l0 = config.l0 or tuple(float(value) for value in k)
    found: list[Recipe] = []
    for arch, seed in product(dict.fromkeys(archs), dict.fromkeys(config.seed)):
        penalised = arch in PENALISED
        for target in dict.fromkeys(l0 if penalised else k):
            if not 0 < target < d_sae:
                raise UsageError(
                    f"{arch} with {target:g} of {d_sae} latents active cannot be trained",
                    "choose a k and L0 of at least 1 and far below the number of latents",
                )
            found.append(
                Recipe(
                    arch=arch,
                    k=None if penalised else int(target),
                    l0=float(target) if penalised else None,
                    d_sae=d_sae,
                    seed=seed,
                    steps=config.steps,
                    batch_rows=config.batch_rows,
                    lr=config.lr or REFERENCE_RATE * math.sqrt(2**14 / d_sae),
                    warmup=config.warmup,
                    decay=config.decay,
                    clip=config.clip,
                    dead_after=config.dead_after or math.ceil(200 * d_sae / target),
                    b_dec=config.b_dec,
                    penalty=config.penalty,
                    init=start.sha256 if start else "",
                )
            )
    return found


def _check_numbers(config: TrainConfig, d_sae: int) -> None:
    def check(good: bool, name: str, what: str) -> None:
        if not good:
            value = getattr(config, name)
            raise UsageError(f"--{name.replace('_', '-')} {value}: {what}")

    for name in ("steps", "batch_rows", "batch_size", "train_limit", "dead_after"):
        value = getattr(config, name)
        check(value is None or value >= 1, name, "1 or more")
    for name in ("lr", "clip", "expansion"):
        value = getattr(config, name)
        check(value is None or 0 < value < math.inf, name, "a number above 0")
    for name in ("warmup", "decay"):
        check(0 <= getattr(config, name) <= 1, name, "a share of the steps, from 0 to 1")
    for name in ("workers", "checkpoint_minutes"):
        value = getattr(config, name)
        check(value is None or value >= 0, name, "0 or more")
    check(bool(config.seed), "seed", "at least one is needed")
    check(all(0 <= seed < 2**63 for seed in config.seed), "seed", "0 or a positive integer")
    check(d_sae >= 2, "d_sae", "2 or more latents")


def _check_start(config: TrainConfig, start: Start, archs: tuple[Arch, ...], d_sae: int) -> None:
    if archs != (start.arch,):
        raise UsageError(
            f"'{config.init}' is a {start.arch} SAE and cannot start a {', '.join(archs)} one",
            f"leave --arch away, or give --arch {start.arch}",
        )
    if d_sae != start.d_sae:
        raise UsageError(
            f"'{config.init}' has {start.d_sae} latents, not {d_sae}", "leave --d-sae away"
        )


def sae_name(config: TrainConfig, recipe: Recipe, default_site: str, n: int) -> str:
    """The entry's name below its backbone's folder, unique within the call.

    `topk-k16`; other sites, tokens, parents and starts than the default are part of it.
    """
    if config.name and n == 1:
        return config.name
    parts = [config.name] if config.name else []
    if not config.name:
        if config.on:
            parts.append("on-" + _flat(config.on))
        elif config.site and config.site != default_site:
            parts.append(_flat(config.site))
        if config.tokens != "all":
            parts.append(config.tokens.replace("+", "-"))
        if config.init:
            parts.append("from-" + _flat(config.init))
    return "-".join([*parts, recipe.setting])


def _flat(name: str) -> str:
    """The last part of a name or path, without suffix."""
    last = name.removeprefix("sae:").replace(os.sep, "/").rsplit("/", 1)[-1]
    return last.removesuffix(".toml").removesuffix(".safetensors")
