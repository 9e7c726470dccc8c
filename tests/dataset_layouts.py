"""Small datasets in the layouts that the real ones have: folders, tar shards, the hub's Parquet."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_sample_images

from saebench.data.imagenet import lemmas, wnids

PHOTOGRAPHS = [np.asarray(image) for image in load_sample_images().images]


def photograph(seed: int, size: int = 24, suffix: str = "JPEG") -> bytes:
    """An encoded crop of one of scikit-learn's photographs."""
    rng = np.random.default_rng(seed)
    picture = PHOTOGRAPHS[seed % len(PHOTOGRAPHS)]
    top, left = rng.integers(0, 300), rng.integers(0, 500)
    buffer = io.BytesIO()
    Image.fromarray(picture[top : top + size, left : left + size]).save(buffer, suffix)
    return buffer.getvalue()


@dataclass(frozen=True)
class Picture:
    """One image: its class number, its file's name without suffix, its bytes."""

    label: int
    stem: str
    data: bytes


def imagenet() -> dict[str, list[Picture]]:
    """Four of ImageNet's classes, among them the second `crane`, under its files' true names."""
    rows: dict[str, list[Picture]] = {"train": [], "val": []}
    for place, label in enumerate((0, 134, 517, 999)):
        for i in range(3):
            stem = f"{wnids()[label]}_{10026 + 7 * i + place}"
            rows["train"].append(Picture(label, stem, photograph(10 * place + i)))
        for i in range(2):
            stem = f"ILSVRC2012_val_{293 + 4000 * i + place:08d}"
            rows["val"].append(Picture(label, stem, photograph(100 + 10 * place + i)))
    return rows


def as_folders(rows: Mapping[str, Sequence[Picture]], root: Path) -> None:
    """`<root>/<split>/<WordNet id>/<file>.JPEG`."""
    for split, pictures in rows.items():
        for picture in pictures:
            path = root / split / wnids()[picture.label] / f"{picture.stem}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.data)


def as_shards(rows: Mapping[str, Sequence[Picture]], root: Path) -> None:
    """`imagenet1k-train-0000.tar` and so on, as of timm/imagenet-1k-wds: .jpg, .cls, .json."""
    root.mkdir(parents=True, exist_ok=True)
    for split, pictures in rows.items():
        name = {"val": "validation"}.get(split, split)
        for shard in range(2):
            with tarfile.open(root / f"imagenet1k-{name}-{shard:04d}.tar", "w") as tar:
                for picture in pictures[shard::2]:
                    add(tar, f"{picture.stem}.jpg", picture.data)
                    add(tar, f"{picture.stem}.cls", str(picture.label).encode())
                    about = {"filename": f"{picture.stem}.JPEG", "label": picture.label}
                    add(tar, f"{picture.stem}.json", json.dumps(about).encode())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member of a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def imagenet_files(rows: Mapping[str, Sequence[Picture]]) -> dict[str, bytes]:
    """The files of ILSVRC/imagenet-1k: shards, the class in the paths, a hidden test split."""
    names = list(lemmas())
    names[517] = "crane2"  # ClassLabel wants each name once
    files = {"README.md": card({"default": ("train", "validation", "test")})}
    splits = {
        "train": rows["train"],
        "validation": rows["val"],
        "test": [Picture(-1, "ILSVRC2012_test_00000001", photograph(999))],
    }
    for split, pictures in splits.items():
        shards = 2 if split == "train" else 1
        for shard in range(shards):
            some = pictures[shard::shards]
            images = [
                {
                    "bytes": p.data,
                    "path": f"{p.stem}_{wnids()[p.label]}.JPEG"
                    if p.label >= 0
                    else f"{p.stem}.JPEG",
                }
                for p in some
            ]
            columns = {"image": images, "label": [p.label for p in some]}
            files[f"data/{split}-{shard:05d}-of-{shards:05d}.parquet"] = parquet(
                columns, {"image": IMAGE, "label": class_label(names)}
            )
    return files


# The hub's Parquet

IMAGE = {"_type": "Image"}


def class_label(names: Sequence[str]) -> dict[str, object]:
    """The feature of a column of labels with names."""
    return {"_type": "ClassLabel", "names": list(names)}


def parquet(
    columns: Mapping[str, Sequence[object]], features: Mapping[str, object], rows_each: int = 4
) -> bytes:
    """A Parquet file as `push_to_hub` writes it, with its features in the schema's metadata.

    Written with pyarrow alone, so that what reads it is tested against the format.
    """
    types = {"Image": pa.struct([("bytes", pa.binary()), ("path", pa.string())])}
    arrays = {
        name: pa.array(values, types["Image"] if features.get(name) == IMAGE else None)
        for name, values in columns.items()
    }
    table = pa.table(arrays)
    if features:
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows_each)
    return buffer.getvalue()


def card(configs: Mapping[str, Sequence[str]], folder: Mapping[str, str] | None = None) -> bytes:
    """A dataset card with its `configs`; folder: configuration -> where its files lie (data)."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        where = (folder or {}).get(config, "data")
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {where}/{split}-*"]
    return "\n".join([*lines, "---", "", "# A dataset", ""]).encode()


def write(files: Mapping[str, bytes], root: Path) -> Path:
    """Files below a folder."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`."""
    from datasets import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
