"""`saebench show`: what an entry says, and what of it is on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from saebench.data import Access
from saebench.registry import Registry
from saebench.showing import images_here, site_lines
from saebench.specs import DatasetSpec, FolderForm, SiteSpec


def block(number: int, width: int = 8) -> SiteSpec:
    return SiteSpec(path=f"blocks.{number}", width=width, cls=1, grid=(2, 2))


def test_blocks_that_differ_in_their_number_alone_are_one_line() -> None:
    sites = {f"blocks.{i}": block(i) for i in range(12)}
    sites["norm"] = SiteSpec(path="norm", width=8, cls=1, grid=(2, 2))
    assert list(site_lines(sites)) == [
        "blocks.0 … blocks.11: path=blocks.*, width=8, layout=tokens, cls=1, grid=(2, 2)",
        "norm: path=norm, width=8, layout=tokens, cls=1, grid=(2, 2)",
    ]


def test_nothing_that_differs_is_hidden() -> None:
    sites = {"blocks.0": block(0), "blocks.1": block(1, width=16), "blocks.2": block(3)}
    sites["in.2"] = SiteSpec(path="blocks.2", side="input", kind="branch", width=8, cls=1)
    lines = list(site_lines(sites))
    assert [line.partition(":")[0] for line in lines] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "in.2",
    ]
    assert "path=blocks.3" in lines[2]  # not what its name says
    assert "side=input, kind=branch" in lines[3]


def test_every_site_of_every_backbone_is_shown() -> None:
    registry = Registry.load()
    for name in registry.backbones:
        sites = registry.backbone(name).sites
        lines = list(site_lines(sites))
        shown = 0
        for line in lines:
            first, _, last = line.partition(":")[0].partition(" … ")
            names = list(sites)
            shown += names.index(last or first) - names.index(first) + 1
        assert shown == len(sites), name


def test_how_many_images_are_here(tmp_path: Path) -> None:
    spec = DatasetSpec(name="pets", source="images", folder=FolderForm())
    for place in ("train/cat/a", "train/dog/b", "test/cat/c"):
        path = tmp_path / "pets" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    assert list(images_here(spec, Access(tmp_path))) == [
        "on this machine: 2 train and 1 test images of 2 classes"
    ]
    first, *rest = images_here(spec, Access(tmp_path / "pets"))
    assert first == "not on this machine:"
    assert any(str(tmp_path / "pets/pets") in line for line in rest)


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_the_embedded_images_are_always_here(name: str) -> None:
    (line,) = images_here(Registry.load().dataset(name), Access())
    assert line.startswith("on this machine: ")
