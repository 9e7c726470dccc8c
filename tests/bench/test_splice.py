"""What do clean, zero, mean and eight splices cost beside what they cannot do without?

    pytest tests/bench/test_splice.py -m bench -n 0 --benchmark-enable -s

They cannot do without one pass of the backbone, ten times what comes after the site, and eight
encoder products. Ratios are of medians over interleaved rounds in one process, to that sum and to a
loop that runs the whole backbone eleven times; docs/performance.md has results.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.bench.setting import Interleaved, best_product
from tests.bench.splicing import CLASSES, Splicing
from tests.bench.test_speed import report

pytestmark = pytest.mark.bench

IMAGES, ROUNDS = 8, 3


@pytest.fixture(scope="module")
def setting() -> Splicing:
    return Splicing(IMAGES)


@torch.inference_mode()
def test_what_is_timed_is_right(setting: Splicing) -> None:
    """Clean and identity bit for bit, everything else as a loop of forward hooks has it."""
    full, plain, short = setting.logits(), setting.naive(), setting.logits("cls")
    assert full["clean"].shape == (IMAGES, CLASSES)
    assert torch.equal(full["clean"], setting.forward())
    assert torch.equal(full["identity"], full["clean"])
    assert torch.equal(short["identity"], short["clean"])
    assert torch.equal(setting.after(), full["clean"])
    names = ["clean", "zero", "mean", *(f"sae {i}" for i in range(8))]
    assert set(plain) == set(names)
    for name in names:
        scale = plain[name].abs().max()
        assert (full[name] - plain[name]).abs().max() <= 1e-4 * scale, name
        assert (short[name] - full[name]).abs().max() <= 1e-5 * scale, name
        assert name == "clean" or (plain[name] - plain["clean"]).abs().max() > 1e-2 * scale
    scale = full["clean"].abs().max()
    assert (setting.after_cls() - full["clean"]).abs().max() <= 1e-5 * scale


def test_eight_splices(benchmark: Any, setting: Splicing) -> None:
    """Beside what they cannot do without (we mean to stay below 1.25 of it), short or full."""
    with torch.inference_mode():
        best, product = best_product(setting.x_btd, setting.saes[0])
    rounds = Interleaved(
        forward=setting.forward,
        after=lambda: [setting.after() for _ in range(10)],
        after_cls=lambda: [setting.after_cls() for _ in range(10)],
        products=lambda: [product() for _ in setting.saes],
        saebench=setting.measured,
        saebench_cls=lambda: setting.measured("cls"),
        naive=setting.naive,
    )
    report(benchmark, f"{IMAGES} images ({best})", rounds, ROUNDS)
    for clock, name in enumerate(("clock", "CPU time")):
        seconds = rounds.medians(clock)
        for run, after in (("saebench", "after"), ("saebench_cls", "after_cls")):
            bare = seconds["forward"] + seconds[after] + seconds["products"]
            eleven = 11 * seconds["forward"] + seconds["products"]
            print(
                f"\n{run}, {name}: {seconds[run] / bare:.2f} of what they cannot do without, "
                f"{seconds['naive'] / seconds[run]:.2f} times as fast as the loop, "
                f"{eleven / seconds[run]:.2f} as eleven passes and eight products"
            )
