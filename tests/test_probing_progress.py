"""What is seen of a run while it collects features for probes and fits them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from saebench.api import config_of, execute
from saebench.probe_options import LONG
from saebench.probing import fits
from saebench.probing.prober import Fitting
from saebench.progress import ProgressWatch
from tests.test_probing_fits import GIVEN, SAE


def test_a_run_says_what_it_collects_and_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(fits, "SPARSE", (5,))
    watch = ProgressWatch(Console(file=io.StringIO(), width=200))
    seen: list[Fitting] = []
    show = watch.fitting
    monkeypatch.setattr(watch, "fitting", lambda one: (seen.append(one), show(one)))
    config = config_of(**{**GIVEN, "sae": SAE, "train_limit": 50, "limit": 4, "out": tmp_path})
    assert not execute(config, watch).failed
    assert isinstance(watch.console.file, io.StringIO)
    lines = watch.console.file.getvalue().splitlines()
    assert "collecting features of 50 train images for probes" in lines
    said = [line for line in lines if "fitting" in line]
    assert said == [f"{SAE}: fitting the probe on clean features, on 50 train images"]
    assert [(one.done, one.of) for one in seen] == [(i, 6) for i in range(6)]
    assert [one.what for one in seen[1:]] == [
        "the probe on its reconstructions",
        "the probe on its codes",
        "the probe on the best 5 of its codes",
        "the tree on its codes",
        "the best latent of each class",
    ]


def test_bars_of_the_pass_and_of_fits() -> None:
    out = io.StringIO()
    watch = ProgressWatch(Console(file=out, width=120, force_terminal=True))
    watch.collecting(40_000)
    watch.collected(1_400)
    watch.fitting(Fitting("a", "the probe on its codes", 80, 2, 15))
    watch.bar.refresh()
    with watch.bar:
        pass
    shown = out.getvalue()
    assert "collecting features" in shown
    assert "1400/40000" in shown
    assert "train images" in shown
    assert "fitting probes" in shown
    assert "3/15" in shown
    assert "the probe on its codes" not in shown  # no line for each


def test_long_fits_are_each_said_in_a_file() -> None:
    out = io.StringIO()
    watch = ProgressWatch(Console(file=out, width=120))
    for n in (LONG, LONG + 1):
        for what in ("one", "two"):
            watch.fitting(Fitting(str(n), what, n, 0, 2))
    assert [line.partition(", on")[0] for line in out.getvalue().splitlines()] == [
        "32768: fitting one",
        "32769: fitting one",
        "32769: fitting two",
    ]
