"""What a run does where memory runs out in the pass for probes, or in a fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from saebench.api import config_of, execute
from saebench.probing import chunks, fits
from saebench.probing.fits import Fits
from tests.test_probing_fits import GIVEN, SAE, Case, Counting


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("out of memory")])
def test_memory_that_runs_out_in_a_fit_is_an_error_of_its_own_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    honest = Fits.probes

    def probes(self: Fits) -> Any:
        if self.collected is not None and self.wanted.asked.unit.coder.name == SAE:
            raise error
        return honest(self)

    monkeypatch.setattr(fits.Fits, "probes", probes)
    monkeypatch.setattr(fits, "SPARSE", ())
    case = Case(tmp_path)
    with pytest.warns(UserWarning, match=f"1 units failed.*{SAE}"):
        rows = case.run()
    assert set(rows["sae"]) == {"identity"}
    (said,) = (json.loads(file.read_text()) for file in (tmp_path / "out/_errors").iterdir())
    assert f"memory ran out fitting the probes of {SAE}" in str(said)
    assert "--train-limit" in str(said)
    assert "linear_probe.solver=ridge" in str(said)


def test_memory_that_runs_out_in_the_pass_leaves_the_units_without_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(*args: Any, **options: Any) -> NoReturn:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(chunks.Filling, "append", runs_out)
    watch = Counting()
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    tasks = ["linear_probe", "dead_neurons"]
    config = config_of(**{**GIVEN, "task": tasks, "out": tmp_path / "out", "batch_size": 2})
    found = execute(config, watch)
    assert {unit.task.name for unit in found.failed} == {"linear_probe"}
    assert len(found.failed) == 2
    assert set(found.rows["task"]) == {"dead_neurons"}
    assert watch.said[-1].endswith("row tiles of 4 MiB and batches of 1 images")
