"""The loader: fixed cuts, workers that decode ahead, bad images, workers that die, Ctrl-C."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from saebench.data import Access, Dataset, Manifest, loader, open_dataset, pieces
from saebench.data.dataset import undecodable
from saebench.data.loader import batches, choose_workers, parts
from saebench.errors import DataError, ImageError, SaebenchError
from saebench.specs import DatasetSpec, FolderForm, TarForm
from tests.image_collections import picture, write, write_tar

SPEC = DatasetSpec(name="toy", source="toy")
N = 100


class Numbers(Dataset):
    """Image i is i, in every pixel. Those in `bad` do not decode; `deadly` ends its worker."""

    splits = ("test",)
    class_names = ("only",)
    label_names = {}  # noqa: RUF012
    decodes = True
    bad: tuple[int, ...] = ()
    deadly: int = -1
    signum: int = signal.SIGKILL

    def _build_manifest(self, split: str) -> Manifest:
        return Manifest("toy", split, tuple(f"{i:03d}" for i in range(N)), np.zeros(N, np.int64))

    def _decode(self, split: str, index: int) -> Image.Image:
        if index in self.bad:
            raise ValueError("it is no image")
        if index == self.deadly:
            os.kill(os.getpid(), self.signum)
        return Image.new("RGB", (4, 4), (index,) * 3)


class Late:
    """A transform that is another one in workers: the ring is made of an image of the main one."""

    def __init__(self, there: Callable[[Image.Image], torch.Tensor]) -> None:
        self.there = there

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return tensor(image) if get_worker_info() is None else self.there(image)


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def numbers(dataset: Dataset, positions: np.ndarray, size: int, workers: int, **options):
    """[(rows, the numbers in the images' first pixels)] of every batch."""
    found = batches(dataset, "test", positions, tensor, size, workers, **options)
    return [(rows.tolist(), images[:, 0, 0, 0].int().tolist()) for rows, images in found]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_cut_at_fixed_places(workers: int):
    positions = np.random.default_rng(0).permutation(N)
    expected = [positions[a : a + 40].tolist() for a in (0, 40, 80)]
    assert numbers(Numbers(SPEC), positions, 40, workers) == [(rows, rows) for rows in expected]
    assert numbers(Numbers(SPEC), positions[:0], 40, workers) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_are_decoded_ahead_from_one_to_the_next(workers: int):
    dataset = Numbers(SPEC)
    dataset.bad = tuple(range(40, 50))  # the last batch of the first part, all of it
    positions = [np.arange(50), np.arange(50, 50), np.arange(50, 85)]
    told: list[int] = []
    stream = parts(
        dataset,
        "test",
        positions,
        tensor,
        20,
        workers,
        bad_images="skip",
        on_bad=lambda row, why: told.append(row),
    )
    found = [[rows.tolist() for rows, _ in part] for part in stream]
    assert found == [
        [list(range(20)), list(range(20, 40))],
        [],
        [list(range(50, 70)), list(range(70, 85))],
    ]
    assert told == list(range(40, 50))


def test_what_was_handed_out_is_not_written_over(monkeypatch: pytest.MonkeyPatch):
    """Workers write into a ring of five pieces, forty times the batches that are kept here."""
    monkeypatch.setattr(loader, "PIECE", 2)
    monkeypatch.setattr(pieces, "PIECE", 2)
    monkeypatch.setattr(loader, "PREFETCH", 1)
    rings = []
    monkeypatch.setattr(
        loader, "ring_for", lambda *args: rings.append(pieces.ring_for(*args)) or rings[-1]
    )
    found = numbers(Numbers(SPEC), np.arange(N), 4, 2)
    assert found == [(list(range(a, a + 4)),) * 2 for a in range(0, N, 4)]
    assert rings[0].shape == (5, 2, 3, 4, 4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [3, 0])
def test_bad_images_are_left_out_and_told_in_order(workers: int, first: int):
    """Without its first image, whose size is the ring's, pieces come without a ring."""
    dataset = Numbers(SPEC)
    dataset.bad = (first, *range(20, 40), 77)
    told: list[tuple[int, str]] = []
    found = numbers(
        dataset,
        np.arange(N),
        20,
        workers,
        bad_images="skip",
        on_bad=lambda row, why: told.append((row, why)),
    )
    assert [row for row, _ in told] == list(dataset.bad)
    assert told[0][1] == f"image '{first:03d}' of dataset 'toy' cannot be decoded: it is no image"
    good = [[i for i in range(a, a + 20) if i not in dataset.bad] for a in range(0, N, 20)]
    assert found == [(rows, rows) for rows in good if rows], "the second batch is left out"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_fatal_at_its_batch(workers: int):
    dataset = Numbers(SPEC)
    dataset.bad = (45,)
    stream = batches(dataset, "test", np.arange(N), tensor, 20, workers)
    assert len(next(stream)[0]) == len(next(stream)[0]) == 20
    with pytest.raises(ImageError, match="'045' of dataset 'toy' cannot be decoded") as error:
        next(stream)
    assert "--bad-images skip" in error.value.hint
    assert not active_children(), "its workers end at once, and not when memory is swept"


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_not_one_images_fault_is_never_skipped(workers: int):
    class Away(Numbers):
        def _decode(self, split: str, index: int) -> Image.Image:
            raise OSError(116, "Stale file handle")

    with pytest.raises(DataError, match=r"cannot be read: .*Stale file handle"):
        numbers(Away(SPEC), np.arange(N), 20, workers, bad_images="skip")

    def transform(image: Image.Image) -> torch.Tensor:
        raise ValueError("a pipeline that does not fit")

    stream = batches(Numbers(SPEC), "test", np.arange(9), transform, 4, workers, bad_images="skip")
    with pytest.raises(DataError, match=r"'000' .*4 x 4 pixels, fails .*does not fit") as error:
        next(stream)
    assert not isinstance(error.value, ImageError)


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_are_gone_are_never_skipped(tmp_path: Path, workers: int):
    """A disk that is unmounted, or a folder moved away, between two batches."""
    files = {f"{split}/a/{i:02}.png": picture(i) for split in ("train", "test") for i in range(90)}
    write(tmp_path / "own", files)
    spec = DatasetSpec(name="own", source="images", folder=FolderForm())
    dataset = open_dataset(spec, Access(root=tmp_path))
    bad: list[int] = []
    stream = batches(
        dataset, "test", np.arange(90), tensor, 2, workers, bad_images="skip",
        on_bad=lambda row, why: bad.append(row),
    )  # fmt: skip
    assert len(next(stream)[0]) == 2
    (tmp_path / "own").rename(tmp_path / "away")
    with pytest.raises(
        DataError, match=r"was there when .* was listed and is gone.*\.png"
    ) as error:
        list(stream)
    assert not isinstance(error.value, ImageError)
    assert "mounted" in error.value.hint
    assert bad == []


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.ENOENT, "is gone"),
        (errno.ENOTDIR, "is gone"),
        (errno.EACCES, "may not be read"),
        (errno.EPERM, "may not be read"),
        (errno.EIO, "cannot be read"),
        (errno.ESTALE, "cannot be read"),
        (errno.EISDIR, None),
        (errno.ENAMETOOLONG, None),
        (0, None),
    ],
)
def test_what_is_of_one_image_and_what_of_all(code: int, why: str | None):
    found = undecodable("7", "toy", OSError(code, "x") if code else OSError("broken stream"))
    assert isinstance(found, ImageError) == (why is None)
    assert f"image '7' of dataset 'toy' {why or 'cannot be decoded'}" in found.what or (
        why == "is gone" and "listed and is gone" in found.what
    )


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")]
)
def test_memory_that_runs_out_is_not_the_pipelines_fault(error: Exception):
    def transform(image: Image.Image) -> torch.Tensor:
        raise error

    with pytest.raises(SaebenchError, match=r"memory ran out .* image '000'") as said:
        next(batches(Numbers(SPEC), "test", np.arange(9), Late(transform), 4, 1))
    assert "--workers" in said.value.hint
    # Here smaller batches may help, and the run tries them.
    with pytest.raises(type(error)) as raised:
        next(batches(Numbers(SPEC), "test", np.arange(9), transform, 4, 0))
    assert raised.value is error


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_make_no_batch(workers: int):
    def transform(image: Image.Image) -> torch.Tensor:
        first = int(np.asarray(image)[0, 0, 0])
        return torch.zeros(3, 4, 4 + first // 50)

    with pytest.raises(DataError, match=r"\[3, 4, 4\] for some images and \[3, 4, 5\]"):
        list(batches(Numbers(SPEC), "test", np.arange(40, 60), transform, 20, workers))


@pytest.mark.parametrize(
    ("signum", "hint"), [(signal.SIGKILL, "memory ran out"), (signal.SIGTERM, "run it again")]
)
def test_a_killed_worker_is_said_and_nothing_hangs(signum: signal.Signals, hint: str):
    dataset = Numbers(SPEC)
    dataset.deadly, dataset.signum = 30, signum
    before = signal.getsignal(signal.SIGCHLD)
    started = time.monotonic()
    said = f"a process that decodes images was killed by {signum.name}$"
    with pytest.raises(SaebenchError) as error:
        numbers(dataset, np.arange(N), 20, workers=2)
    assert re.search(said, error.value.what)
    assert time.monotonic() - started < 30
    assert hint in error.value.hint
    assert signal.getsignal(signal.SIGCHLD) == before


def test_a_worker_that_leaves_is_said():
    def transform(image: Image.Image) -> torch.Tensor:
        os._exit(3)

    with pytest.raises(SaebenchError, match=r"that decodes images ended \(exit code 3\)"):
        list(batches(Numbers(SPEC), "test", np.arange(9), Late(transform), 4, 1))


def test_a_workers_death_comes_up_in_the_loader_alone():
    """Not wherever the main process happens to be, as torch's own handler has it."""
    dataset = Numbers(SPEC)
    dataset.deadly = 99
    stream = batches(dataset, "test", np.arange(N), tensor, 20, 1)
    next(stream)
    deadline = time.monotonic() + 1.5  # the worker is dead long before: 99 is decoded ahead
    while time.monotonic() < deadline:
        sum(range(1000))
    with pytest.raises(SaebenchError, match="was killed"):
        list(stream)


SCRIPT = """
    import os, signal, sys, time
    import numpy as np
    from tests.test_data_loader import SPEC, Numbers, batches, tensor

    class Slow(Numbers):
        def _decode(self, split, index):
            time.sleep(0.02)
            return super()._decode(split, index)

    stream = batches(Slow(SPEC), "test", np.arange(100), tensor, 4, 2)
    next(stream)
    children = open(f"/proc/self/task/{os.getpid()}/children").read()
    if "stop" in sys.argv:
        os.kill(int(children.split()[0]), signal.SIGSTOP)
    try:
        print(children, flush=True)
        for _ in stream:
            time.sleep(0.5)
    except KeyboardInterrupt:
        print("stopped", flush=True)
        sys.exit(130)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("stopped", ["", "stop"])
@pytest.mark.parametrize("whole_group", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ctrl_c_leaves_no_workers(whole_group: bool, stopped: str):
    """A terminal sends it to the whole process group; `kill` sends it to the main process.

    A worker that is stopped answers neither, and nor does it end.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), stopped],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    try:
        out, _ = process.communicate(timeout=30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, out) == (130, "stopped\n")
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_workers_are_chosen(monkeypatch: pytest.MonkeyPatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    cheap = open_dataset(DatasetSpec(name="digits", source="digits"))
    for cpus, on_cpu, on_gpu in ((1, 1, 1), (2, 1, 2), (8, 2, 8), (64, 16, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cpus: set(range(n)))
        assert choose_workers(Numbers(SPEC), cpu) == on_cpu
        assert choose_workers(Numbers(SPEC), cuda) == on_gpu
        assert choose_workers(cheap, cuda) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_forms_give_the_same_batches(tmp_path: Path, workers: int):
    """Of a folder and of a tar of it, a bad image among them, bit for bit."""
    files = {f"{c}/{i}.png": picture(i) for c in ("a", "b") for i in range(20)}
    files["b/7.png"] = b"no image"
    for split in ("train", "test"):
        write(tmp_path / "f" / "own" / split, files)
        write_tar(tmp_path / "t" / "own" / f"{split}.tar", files)
    base = DatasetSpec(name="own", source="images")
    found = []
    for root, forms in (
        ("f", {"folder": FolderForm()}),
        ("t", {"tar": TarForm(label="folder")}),
    ):
        dataset = open_dataset(replace(base, **forms), Access(root=tmp_path / root))
        order = dataset.manifest("test").order(33)
        bad: list[int] = []
        stream = batches(
            dataset, "test", order, tensor, 16, workers, bad_images="skip",
            on_bad=lambda row, why, bad=bad: bad.append(row),
        )  # fmt: skip
        rows, images = zip(*stream, strict=True)
        ids = [dataset.manifest("test").ids[row] for row in np.concatenate(rows)]
        found.append((ids, torch.cat(images), [dataset.manifest("test").ids[row] for row in bad]))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
