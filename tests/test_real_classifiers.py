"""Two real ImageNet classifiers and real photographs, as a user's own entries (skipped without).

The entries are those that a user writes: ten lines of TOML for each backbone, one of them the base
of the other, and the photographs as an image folder of their own. What accuracy must come out is
said by whoever published the files; wrong pixels, padding or class offset would show in it at once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import saebench
from saebench.backbones import load_backbone
from saebench.data import open_dataset
from saebench.data.loader import batches
from saebench.registry import Registry
from saebench.testing import check_backbone, check_sae
from saebench.train.config import TrainConfig
from saebench.train.run import train

PHOTOS = """\
source = "images"
classes = "imagenet-1k"
holdout = 0.5
[folder]
root = "{photos}"
labels = "photos.csv"
label = "imagenet_class"
"""

BACKBONE = """\
family = "mobilenet"
loader = "timm"
model = "mobilenetv2_100"
model_args = {{ num_classes = 1001, pad_type = "same" }}
weights = {{ file = "{weights}" }}
input = {{ size = 224, resize = "squash", resize_to = 256, interpolation = "bilinear", {pixels} }}
sites = {{ "blocks.5" = {{ path = "blocks.5", layout = "map", width = 160, grid = [7, 7] }} }}
head = {{ kind = "classifier", classes = {{ "imagenet-1k" = [1, 1000] }} }}
dataset = "photos"
"""


def pixels(mean: float, std: float) -> str:
    """(u8 - mean) / std, said of pixels in 0..1."""
    return f"mean = {[mean / 255] * 3}, std = {[std / 255] * 3}"


@pytest.fixture
def root(real_data: Path, tmp_path: Path) -> Path:
    backbones = tmp_path / "registry/backbones"
    datasets = tmp_path / "registry/datasets"
    backbones.mkdir(parents=True)
    datasets.mkdir()
    models = real_data / "mobilenetv2"
    base = BACKBONE.format(
        weights=models / "mobilenetv2_100_imagenet_tf2.safetensors", pixels=pixels(127, 127.5)
    )
    tuned = BACKBONE.format(
        weights=models / "mobilenetv2_100_imagenet.safetensors", pixels=pixels(128, 128)
    )
    (backbones / "mobilenet.toml").write_text(base)
    (backbones / "mobilenet-tuned.toml").write_text(f'base = "mobilenet"\n{tuned}')
    (datasets / "photos.toml").write_text(PHOTOS.format(photos=real_data / "photos"))
    for entry in backbones.iterdir():
        assert len(entry.read_text().splitlines()) <= 10
    return tmp_path


@pytest.mark.parametrize(("name", "top1"), [("mobilenet", 0.726), ("mobilenet-tuned", 0.788)])
def test_top_1_is_what_their_publisher_says(name: str, top1: float, root: Path) -> None:
    registry = Registry.load([root])
    backbone = load_backbone(registry.backbone(name))
    dataset = open_dataset(registry.dataset("photos"))
    outputs = backbone.spec.head.outputs(dataset.spec)
    assert outputs == slice(1, 1001)
    manifest = dataset.manifest("all")
    right = 0
    for rows, images_b3hw in batches(
        dataset, "all", np.arange(len(manifest)), backbone.transform, 50
    ):
        logits_bc = backbone.forward(images_b3hw).logits_bc
        assert logits_bc is not None
        guess_b = logits_bc[:, outputs].argmax(dim=1)
        right += int((guess_b == torch.from_numpy(manifest.labels[rows])).sum())
    assert len(manifest) == 500
    assert right / 500 == pytest.approx(top1, abs=1e-9)


def test_their_classes_are_imagenets(root: Path) -> None:
    dataset = open_dataset(Registry.load([root]).dataset("photos"))
    assert len(dataset.class_names) == 1000
    # By the publisher's own list: 949 is the strawberry, 619 the lampshade.
    assert (dataset.class_names[949], dataset.class_names[619]) == ("strawberry", "lampshade")


@pytest.mark.slow
def test_a_user_checks_trains_and_measures_on_them(root: Path, tmp_path: Path) -> None:
    registry = Registry.load([root])
    for name in ("mobilenet", "mobilenet-tuned"):
        for check in check_backbone(registry, name):
            assert check.passed, check
    (trained,) = train(
        TrainConfig(
            backbone="mobilenet",
            registry=(str(root),),
            out=str(root),
            arch=("topk",),
            k=(16,),
            steps=400,
            batch_size=16,
        )
    )
    assert trained.measured is not None
    assert trained.measured.fvu < 0.5
    registry = Registry.load([root])
    for check in check_sae(registry, trained.name):
        assert check.passed, check
    rows = saebench.run(
        registry=root,
        backbone=("mobilenet", "mobilenet-tuned"),
        task=["reconstruction", "sparsity", "dead_neurons", "loss_substitution"],
        out=tmp_path / "results",
        batch_size=16,
    )
    plain = rows.query("metric == 'fvu' and group == 'all' and variant == ''")
    fvu: pd.Series = plain.set_index(["backbone", "sae"])["value"]
    # Every bit of the reconstruction is measured on photographs that nothing was fitted on.
    assert fvu["mobilenet", trained.name] < 0.7
    assert fvu["mobilenet", trained.name] < fvu["mobilenet", "mean"]
    for name in ("mobilenet", "mobilenet-tuned"):
        assert fvu[name, "identity"] == 0
        assert fvu[name, "mean"] == pytest.approx(1, abs=0.02)
    tasks = set(rows["task"])
    assert {"reconstruction", "sparsity", "dead_neurons"} <= tasks
    assert set(rows["backbone"]) == {"mobilenet", "mobilenet-tuned"}
    assert set(rows.query("variant == ''")["n_images"]) == {250}
    assert set(rows["n_skipped"]) == {0}
