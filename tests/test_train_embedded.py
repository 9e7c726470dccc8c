"""The embedded SAEs: what has to be there, how good they are, and that they can be made again."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.embedded_saes import BACKBONES, SPARSITIES, calls
from saebench import paths
from saebench.backbones import load_backbone
from saebench.data import open_dataset
from saebench.data.loader import batches
from saebench.formats import read_entry
from saebench.registry import Registry
from saebench.train import ARCHITECTURES, train
from saebench.train.job import resolve

FOLDER = paths.CONTENT / "registry" / "saes"
FILES = [path for backbone in BACKBONES for path in (FOLDER / backbone).iterdir()]
NAMES = sorted(
    path.relative_to(FOLDER).with_suffix("").as_posix() for path in FILES if path.suffix == ".toml"
)


@cache
def registry() -> Registry:
    return Registry.load()


@cache
def rows_of(backbone: str, n_images: int) -> torch.Tensor:
    """[n d] activations of test images at the default site."""
    spec = registry().backbone(backbone)
    loaded = load_backbone(spec)
    dataset = open_dataset(registry().dataset("shapes"))
    order = dataset.manifest("test").order(n_images)
    found = [
        loaded.acts(images_b3hw, [spec.site])[spec.site].acts_btd.flatten(0, 1)
        for _, images_b3hw in batches(dataset, "test", order, loaded.transform, 64)
    ]
    return torch.cat(found)


def test_the_set_is_complete() -> None:
    topk = {f"{backbone}/topk-k{k}" for backbone in BACKBONES for k in SPARSITIES}
    seeds = {"tiny-vit/topk-k8-s1", "tiny-vit/topk-k8-s2"}
    assert topk | seeds < set(NAMES)
    assert {registry().sae(n).architecture for n in NAMES if "vit" in n} == set(ARCHITECTURES)
    assert len(NAMES) == len(topk) + len(seeds) + 5
    assert sum(path.stat().st_size for path in FILES) <= 2.4e6


def test_one_recipe_on_all_backbones() -> None:
    for k in SPARSITIES:
        assert len({registry().sae(f"{name}/topk-k{k}").recipe for name in BACKBONES}) == 1
    seeds = [registry().sae(f"tiny-vit/topk-k8{suffix}") for suffix in ("", "-s1", "-s2")]
    assert len({spec.recipe for spec in seeds}) == 1
    assert [spec.seed for spec in seeds] == [0, 1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_on_test_images_it_beats_as_many_principal_components(name: str) -> None:
    spec = registry().sae(name)
    target = int(name.split("-s")[0].replace("-k", "-").rsplit("-", 1)[1])  # of topk-k8-s1: 8
    assert spec.l0 == pytest.approx(target, rel=0.1)
    sae = read_entry(spec)
    x_nd = rows_of(spec.backbone, 64)
    codes = sae.encode(x_nd)
    x, recon = x_nd.double().numpy(), sae.decode(codes).double().numpy()
    centred = x - x.mean(0)
    fvu = ((x - recon) ** 2).sum() / (centred**2).sum()
    # Principal components of the very rows that are tested, which is more than they are due.
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    pca = values[target:].sum() / values.sum()
    assert fvu < (0.9 if spec.architecture == "relu" else 0.5) * pca
    assert codes.l0_n().double().mean().item() == pytest.approx(target, rel=0.15)
    norms_s = sae.decoder_norms_s
    torch.testing.assert_close(norms_s, torch.ones_like(norms_s), atol=2e-3, rtol=0)


def test_the_table_in_the_docs_is_that_of_the_entries() -> None:
    lines = (paths.CONTENT / "docs" / "train.md").read_text().splitlines()
    shown = {line.split("`")[1]: line for line in lines if line.startswith("| `tiny-")}
    assert sorted(shown) == NAMES
    for name in NAMES:
        numbers = re.findall(r"(?:L0|fvu|dead) ([\d.]+)", registry().sae(name).description)
        assert re.findall(r"[\d.]+", shown[name].split("`")[2])[:3] == numbers


@pytest.mark.parametrize("backbone", BACKBONES)
def test_they_count_as_made(backbone: str) -> None:
    """Their files are older than the identity that newer ones carry."""
    for call in calls(backbone, paths.CONTENT):
        assert resolve(call, registry(), paths.CONTENT).todo == {}


@pytest.mark.slow
def test_an_embedded_set_can_be_made_again(tmp_path: Path) -> None:
    (call,) = calls("tiny-resnet", tmp_path)
    # Under another name: that of the embedded ones is taken.
    for made in train(replace(call, name="again")):
        spec = registry().sae(made.name.replace("again-", ""))
        assert made.measured is not None
        assert spec.recipe == made.recipe.title
        fvu = float(spec.description.split("fvu ")[1].split(",")[0])
        # Another processor or number of threads rounds differently, and training spreads it.
        assert made.measured.fvu == pytest.approx(fvu, rel=0.03)
        assert made.measured.dead <= 0.02 * 384
