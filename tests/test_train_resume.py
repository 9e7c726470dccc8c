"""A training that is killed and started again ends bit for bit where it would have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from saebench.errors import WeightsError
from saebench.train.checkpoint import Checkpoint
from saebench.train.fit import fit, measure
from saebench.train.recipe import ARCHITECTURES
from tests.train_cases import CPU, known_features, recipe, same, stream

STEPS = 150
RECIPES = [recipe(arch, steps=STEPS, dead_after=2000) for arch in ARCHITECTURES]

CHILD = """
import sys, time
from pathlib import Path
import torch
from saebench.train.checkpoint import Checkpoint
from saebench.train.fit import fit, measure
from tests.test_train_resume import RECIPES
from tests.train_cases import CPU, known_features, stream
torch.set_num_threads(int(sys.argv[2]))
fit(RECIPES, stream(known_features()[0]), device=CPU,
    checkpoint=Checkpoint(Path(sys.argv[1]), "it", every_seconds=0.0),
    watch=lambda done, trainees: time.sleep(0.02))
"""


def test_a_kill_in_the_middle_changes_no_bit(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    threads = torch.get_num_threads()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(threads)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": "."},
    )
    checkpoint, step = Checkpoint(path, "it"), 0
    deadline = time.monotonic() + 60
    while step < 40 and time.monotonic() < deadline:
        assert child.poll() is None, "the training ended before it was killed"
        time.sleep(0.05)
        step = (checkpoint.load() or {"step": 0})["step"]
    child.send_signal(signal.SIGKILL)
    child.wait()
    saved = checkpoint.load()
    assert saved is not None
    assert 40 <= saved["step"] < STEPS

    steps_seen: list[int] = []
    x_nd, _ = known_features()
    resumed = fit(
        RECIPES,
        stream(x_nd),
        device=CPU,
        checkpoint=checkpoint,
        watch=lambda done, trainees: steps_seen.append(done),
    )
    assert steps_seen[0] == saved["step"] + 1
    for one, undisturbed in zip(resumed, fit(RECIPES, stream(x_nd), device=CPU), strict=True):
        assert same(one, undisturbed), one.recipe.setting


def test_what_has_diverged_is_remembered(tmp_path: Path) -> None:
    """It is not tried again from a checkpoint, and the others end as if it had not been there."""
    x_nd, _ = known_features(2000)
    good, bad = recipe("topk", steps=40), recipe("topk", steps=40, lr=1e38)
    checkpoint = Checkpoint(tmp_path / "c.pt", "it", every_seconds=0.0)

    class Stop(Exception):
        pass

    def stop(done: int, trainees: object) -> None:
        if done == 20:
            raise Stop

    with pytest.raises(Stop):
        fit([bad, good], stream(x_nd), device=CPU, checkpoint=checkpoint, watch=stop)
    told: list[tuple[object, str]] = []
    (resumed,) = fit(
        [bad, good],
        stream(x_nd),
        device=CPU,
        checkpoint=checkpoint,
        on_divergence=lambda one, why: told.append((one, why)),
    )
    assert [one for one, _ in told] == [bad]
    assert "--lr" in told[0][1]
    assert same(resumed, fit([good], stream(x_nd), device=CPU)[0])


def test_a_checkpoint_without_one_of_the_saes_is_no_start_for_it(tmp_path: Path) -> None:
    x_nd, _ = known_features(2000)
    first, second = recipe("topk", steps=10), recipe("topk", 5, steps=10)
    checkpoint = Checkpoint(tmp_path / "c.pt", "it")
    fit([first], stream(x_nd), device=CPU, checkpoint=checkpoint)
    both = fit([first, second], stream(x_nd), device=CPU, checkpoint=checkpoint)
    for one, undisturbed in zip(both, fit([first, second], stream(x_nd), device=CPU), strict=True):
        assert same(one, undisturbed)


def test_a_checkpoint_is_never_that_of_another_training(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "c.pt", "one").save({"step": 1})
    with pytest.raises(WeightsError, match="another training"):
        Checkpoint(tmp_path / "c.pt", "two").load()


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c.pt", "one")
    checkpoint.save({"step": 1, "tensor": torch.zeros(1000)})
    data = checkpoint.path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"not a checkpoint"):
        checkpoint.path.write_bytes(damaged)
        with pytest.raises(WeightsError, match="delete it"):
            checkpoint.load()


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    path = tmp_path / "c.pt"
    torch.save({"version": 1, "identity": "one", "step": Harmful()}, path)
    with pytest.raises(WeightsError):
        Checkpoint(path, "one").load()
    assert not (tmp_path / "harm").exists()


@pytest.mark.gpu
def test_on_a_gpu_training_starts_resumes_and_finishes(tmp_path: Path) -> None:
    """Its sums have no fixed order, so that it is close to the CPU's and not the same bits."""
    device = torch.device("cuda")
    checkpoint = Checkpoint(tmp_path / "c.pt", "it", every_seconds=0.0)
    x_nd, _ = known_features()

    class Stop(Exception):
        pass

    def stop(done: int, trainees: object) -> None:
        if done == STEPS // 2:
            raise Stop

    with pytest.raises(Stop):
        fit(RECIPES, stream(x_nd), device=device, checkpoint=checkpoint, watch=stop)
    on_gpu = fit(RECIPES, stream(x_nd), device=device, checkpoint=checkpoint)
    for gpu, cpu in zip(on_gpu, fit(RECIPES, stream(x_nd), device=CPU), strict=True):
        a, b = (measure(one.sae.to(CPU), stream(x_nd), CPU) for one in (gpu, cpu))
        assert a.fvu == pytest.approx(b.fvu, rel=0.1), gpu.recipe.setting
