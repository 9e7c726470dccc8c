"""A whole run of what lies on a hub: backbone, SAE and images, fetched, locked, in every row."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save

from saebench.formats import write_sae
from tests import dataset_layouts as layouts
from tests.content import write
from tests.hub_stand_in import HubStandIn
from tests.small import SIZES, WIDTH, random_sae

MODEL, SAE, IMAGES = "someone/small-vit", "someone/saes", "someone/pets"
FEATURES = {"image": layouts.IMAGE, "label": layouts.class_label(("cat", "dog"))}

BACKBONE = f"""\
family = "vit"
pretraining = "none"
loader = "timm"
model = "hf-hub:{MODEL}"
dataset = "pets"
input = {{ size = 32, resize = "squash", crop = false }}
sites = {{ "blocks.1" = {{ path = "blocks.1", width = {WIDTH}, cls = 1, grid = [4, 4] }} }}
"""
DATASET = f"""\
source = "images"
train = "train"
test = "test"
[hub]
repo = "{IMAGES}"
"""
ENTRY = f"""\
backbone = "far"
site = "blocks.1"
[weights]
hub = "{SAE}"
filename = "topk.safetensors"
"""


def weights(seed: int) -> bytes:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", **SIZES)
    return save({name: tensor * 4 for name, tensor in model.state_dict().items()})


def config() -> bytes:
    """As timm.models.push_to_hf_hub writes it."""
    sizes = {key: value for key, value in SIZES.items() if key != "num_classes"}
    return json.dumps(
        {
            "architecture": "vit_tiny_patch16_224",
            "num_classes": 0,
            "model_args": sizes,
            "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 0},
        }
    ).encode()


def pets() -> dict[str, bytes]:
    def rows(n: int, first: int) -> bytes:
        images = [
            {"bytes": layouts.photograph(first + i, 32, "PNG"), "path": f"{first + i:04d}.png"}
            for i in range(n)
        ]
        return layouts.parquet({"image": images, "label": [i % 2 for i in range(n)]}, FEATURES)

    return {
        "README.md": layouts.card({"default": ("train", "test")}),
        "data/train-00000-of-00001.parquet": rows(12, 0),
        "data/test-00000-of-00001.parquet": rows(8, 100),
    }


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    write_sae(random_sae(), tmp_path / "topk.safetensors")
    with HubStandIn() as hub:
        hub.commit(MODEL, {"config.json": config(), "model.safetensors": weights(0)})
        hub.commit(SAE, {"topk.safetensors": (tmp_path / "topk.safetensors").read_bytes()})
        hub.commit(IMAGES, pets(), kind="dataset")
        yield hub


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(
        tmp_path / "content",
        {
            "registry/backbones/far.toml": BACKBONE,
            "registry/datasets/pets.toml": DATASET,
            "registry/saes/far/topk.toml": ENTRY,
        },
    )


def saebench(hub: HubStandIn, home: Path, *words: str, **env: str) -> str:
    """What a command prints; it has to succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "saebench", *words],
        env=hub.env(home, SAEBENCH_STORE=str(home / "store"), **env),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run(hub: HubStandIn, home: Path, root: Path, *words: str, **env: str) -> pd.DataFrame:
    out = home / "results"
    saebench(
        hub, home, "run", "--backbone", "far", "--registry", str(root), "--out", str(out), *words,
        **env,
    )  # fmt: skip
    return pd.read_parquet(out / "results.parquet")


def values(rows: pd.DataFrame) -> pd.DataFrame:
    key = ["unit_id", "group", "metric", "variant"]
    return rows[[*key, "value", "backbone_revision"]].sort_values(key, ignore_index=True)


@pytest.mark.slow
def test_every_row_says_which_commits_it_rests_on_and_they_stay(
    hub: HubStandIn, root: Path, tmp_path: Path
) -> None:
    rows = run(hub, tmp_path, root)
    main = {repo: hub.repo(repo).refs["main"] for repo in (MODEL, SAE)}
    assert set(rows["backbone_revision"]) == {main[MODEL]}
    assert set(rows["backbone_sha256"]) == {hashlib.sha256(weights(0)).hexdigest()}
    own = rows.query("sae == 'far/topk'")
    assert set(own["sae_revision"]) == {main[SAE]}
    file = hub.repo(SAE).commits[main[SAE]]["topk.safetensors"]
    assert set(own["sae_sha256"]) == {hashlib.sha256(file).hexdigest()}
    assert set(rows["dataset_revision"]) == {hub.repo(IMAGES, "dataset").refs["main"]}
    assert rows["stratified"].all()
    assert set(rows["n_images"]) >= {8}
    # The branch moves on to other weights; what was locked is still what is measured.
    hub.commit(MODEL, {"config.json": config(), "model.safetensors": weights(1)})
    again = run(hub, tmp_path, root, "--overwrite", "all")
    pd.testing.assert_frame_equal(values(rows), values(again))


def test_after_a_fetch_the_compute_node_needs_no_network(
    hub: HubStandIn, root: Path, tmp_path: Path
) -> None:
    said = saebench(hub, tmp_path, "fetch", "far", "far/topk", "pets", "--registry", str(root))
    for name in ("far", "far/topk", "pets"):
        assert any(line.startswith(name) for line in said.splitlines()), said
    asked = len(hub.requests)
    rows = run(
        hub, tmp_path, root, "--task", "reconstruction", "loss_substitution", HF_HUB_OFFLINE="1"
    )
    assert len(hub.requests) == asked
    assert set(rows["sae"]) >= {"far/topk", "identity"}


@pytest.mark.slow
def test_a_stream_takes_its_first_images_and_says_so(
    hub: HubStandIn, root: Path, tmp_path: Path
) -> None:
    entry = root / "registry/datasets/pets.toml"
    entry.write_text(entry.read_text() + "streaming = true\n")
    rows = run(hub, tmp_path, root, "--limit", "5", "--train-limit", "6")
    assert not rows["stratified"].any()
    assert set(rows.query("variant == ''")["n_images"]) == {5}


@pytest.mark.slow
def test_a_dry_run_downloads_no_weights(hub: HubStandIn, root: Path, tmp_path: Path) -> None:
    words = ("run", "--backbone", "far", "--registry", str(root), "--dry-run")
    said = saebench(hub, tmp_path, *words, "--dataset", "digits", "--out", str(tmp_path / "out"))
    assert "units to measure" in said
    assert not [path for path in hub.gets() if path.endswith(".safetensors")]
    assert io.StringIO(said).readline().startswith("backbone")
