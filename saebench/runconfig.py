"""What a run is asked for: the options of `saebench run`, and the keywords of `saebench.run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Measure SAEs on backbones, and write a table of results.

    Without options: the embedded benchmark, which needs no download. With a backbone: all its SAEs
    and controls, every task, on the backbone's own dataset. Finished work is never done twice.
    """

    backbone: tuple[str, ...] = ()  # names or globs; none: the embedded benchmark
    sae: tuple[str, ...] = ()  # names or globs of SAEs and controls; none: all of the backbone's
    task: tuple[str, ...] = ()  # names or globs; none: every task that applies
    dataset: tuple[str, ...] = ()  # names or globs; none: the backbone's own
    limit: int | None = None  # first n images of the evaluation split
    train_limit: int | None = None  # first n train images to fit statistics (2048) and probes on
    shots: tuple[int, ...] = ()  # also probes of so few train images a class:  --shots 1 5 10
    option: tuple[str, ...] = ()  # choices that a task leaves to you, as TASK.NAME=VALUE
    splice_together: bool = False  # all chosen SAEs of a backbone at once, each at its own site
    last_block: Literal["full", "cls"] = "full"  # cls: of the last block only what a CLS head sees
    seed: int = 0  # of what is random: the @random and @shuffled-decoder controls
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the backbone
    batch_size: int = 64  # images
    memory: str = "4GiB"  # for the SAEs held at once; more of them go in further passes
    workers: int | None = None  # processes that decode images; 0 decodes in this one; none: chosen
    data_root: str | None = None  # the folder of datasets, by name; none: $SAEBENCH_DATA
    # tokens: keep activations in the store; later runs read them, and decode no image
    store: Literal["none", "tokens"] = "none"
    bad_images: Literal["fail", "skip"] = "fail"  # what to do with an image that does not decode
    out: str = "results"  # the results folder; the same command again resumes there
    registry: tuple[str, ...] = ()  # content folders searched before all others
    suite: Literal["default", "full"] = "default"  # full: also what takes long
    conventions: bool = False  # add the peers' formulas (some splice once more)
    overwrite: Literal["never", "failed", "all"] = "failed"  # which units are measured again
    dry_run: bool = False  # print what would be done, and do nothing
