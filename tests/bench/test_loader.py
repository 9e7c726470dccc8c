"""Images per second: decoding alone, and what the loader gives with 0, 1 and 2 workers.

On real photographs where they are (`SAEBENCH_REAL_DATA`), else on scikit-learn's and
scikit-image's. The transform is CLIP's: shortest side 224 bicubic, centre crop, mean and std.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from saebench.backbones.pixels import Transform
from saebench.data import Access, Dataset, open_dataset
from saebench.data.decode import decode
from saebench.data.loader import batches
from saebench.specs import DatasetSpec, FolderForm, InputSpec, TarForm
from tests.image_collections import write_tar

pytestmark = pytest.mark.bench

CLIP = Transform(InputSpec(size=224))
N, BATCH, ROUNDS = 400, 64, 3


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with `photos`, a folder of N JPEG files of one class."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "photos" / "all" / "photo"
    folder.mkdir(parents=True)
    real = Path(os.environ.get("SAEBENCH_REAL_DATA", "nowhere")) / "photos"
    files = sorted(real.glob("*.jpg"))
    if not files:
        for i, pixels in enumerate(load_sample_images()["images"]):
            path = folder.parent / f"{i}.jpg"
            Image.fromarray(pixels).save(path, quality=90)
            files.append(path)
    for i in range(N):
        os.symlink(files[i % len(files)], folder / f"{i:04d}.jpg")
    return root


@pytest.fixture(scope="module")
def folder(photographs: Path) -> Dataset:
    spec = DatasetSpec(
        name="photos", source="images", holdout=0.5, folder=FolderForm(splits={"all": "all"})
    )
    return open_dataset(spec, Access(root=photographs))


def measured(functions: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
    """Name -> (images a second, CPU milliseconds an image): medians of interleaved rounds.

    CPU time is that of this process and of the workers it started, which have ended by then.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, run in functions.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            run()
            gc.collect()
            found[name].append((time.perf_counter() - wall, cpu_seconds() - cpu))
    return {
        name: (
            N / statistics.median(wall for wall, _ in rounds),
            1000 / N * statistics.median(cpu for _, cpu in rounds),
        )
        for name, rounds in found.items()
    }


def cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def test_images_per_second(folder: Dataset, photographs: Path):
    torch.set_num_threads(1)
    order = np.arange(N)
    paths = sorted((photographs / "photos" / "all" / "photo").iterdir())
    data = [path.read_bytes() for path in paths]
    folder.manifest("all")

    def loaded(dataset: Dataset, workers: int) -> None:
        for _ in batches(dataset, "all", order, CLIP, BATCH, workers):
            pass

    shards = tar_of(photographs, paths)
    # What is timed is the same work: every way gives the pixels of decoding and transform alone.
    expected = torch.stack([CLIP(decode(one)) for one in data])
    for dataset, workers in ((folder, 0), (folder, 1), (folder, 2), (shards, 0)):
        number = [int(name.rpartition("/")[2]) for name in dataset.manifest("all").ids]
        for rows, images_b3hw in batches(dataset, "all", order, CLIP, BATCH, workers):
            assert torch.equal(images_b3hw, expected[[number[row] for row in rows]])
    found = measured(
        {
            "decoding alone": lambda: [decode(one) for one in data],
            "decoding and transform": lambda: [CLIP(decode(one)) for one in data],
            **{f"loader, {w} workers": lambda w=w: loaded(folder, w) for w in (0, 1, 2)},
            "loader, 0 workers, tar": lambda: loaded(shards, 0),
        }
    )
    base = found["decoding and transform"]
    print(f"\n{N} photographs, batches of {BATCH}, {len(os.sched_getaffinity(0))} CPUs")
    for name, (images, cpu) in found.items():
        print(
            f"{name:<24}{images:7.0f} images/s ({images / base[0]:.2f})"
            f"{cpu:7.2f} CPU ms an image ({cpu / base[1]:.2f})"
        )


def tar_of(photographs: Path, paths: list[Path]) -> Dataset:
    """The same photographs as one shard."""
    write_tar(
        photographs / "photos-tar" / "all.tar",
        {f"{'ab'[i % 2]}/{path.name}": path.read_bytes() for i, path in enumerate(paths)},
    )
    spec = DatasetSpec(name="photos-tar", source="images", holdout=0.5, tar=TarForm(label="folder"))
    dataset = open_dataset(spec, Access(root=photographs))
    dataset.manifest("all")
    return dataset


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_backbone_beside_it(folder: Dataset, workers: int):
    """The share of the time that one waits for images, with a backbone of 8 ms an image."""
    waits, seen = [], 0
    start = last = time.perf_counter()
    for rows, _ in batches(folder, "all", np.arange(N), CLIP, BATCH, workers):
        waits.append(time.perf_counter() - last)
        time.sleep(0.008 * len(rows))  # an accelerator, which needs no CPU
        seen += len(rows)
        last = time.perf_counter()
    assert seen == N
    total = time.perf_counter() - start
    print(
        f"\n{workers} workers: waited {waits[0]:.2f} s for the first batch and "
        f"{sum(waits[1:]):.2f} s for the others, of {total:.1f} s"
    )
