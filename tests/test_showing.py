"""`saebench show`: what an entry says, and what of it is on this machine."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from saebench.beside import beside_wanted
from saebench.data import Access
from saebench.formats import write_sae
from saebench.hub import fetch
from saebench.registry import Registry
from saebench.showing import images_here, option_lines, print_show, site_lines
from saebench.specs import DatasetSpec, FolderForm, SiteSpec
from saebench.splice import POLICIES
from saebench.task import Option
from saebench.taskfiles import describe, load_task
from saebench.weights import wanted
from tests.asking_format import asking as asking
from tests.content import sae_entry
from tests.hub_stand_in import HubStandIn
from tests.hub_stand_in import hub as hub
from tests.small import random_sae


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


def test_what_a_task_leaves_to_its_user_is_shown_as_the_task_has_it() -> None:
    """`show` reads the source, and runs nothing; the class is the judge."""
    registry = Registry.load()
    for name in registry.match_tasks(()):
        described, task = describe(registry, name), load_task(registry, name)
        assert dict(described.options) == dict(task.options)
    lines = list(option_lines(describe(registry, "loss_substitution")))
    assert lines[0] == "options, as  --option loss_substitution.NAME=VALUE"
    assert lines[1].startswith("  replaced = sae_tokens · tokens that the reconstruction replaces")
    assert lines[1].endswith("one of " + ", ".join(POLICIES))
    assert list(option_lines(describe(registry, "sparsity"))) == []
    out = io.StringIO()
    print_show(registry, "loss_substitution", Console(file=out, width=200))
    assert lines[2] in out.getvalue()


def test_options_that_no_class_would_have_do_not_stop_a_listing(tmp_path: Path) -> None:
    """Whoever imports the file is told what is wrong with it."""
    (tmp_path / "tasks").mkdir()
    text = """'''Odd.'''
from saebench.task import Option, Task

A = ("x", *B)
MORE = {"k": Option(**A), "one": Option("x", A, doc=str(3)), "two": Option(), "n": Option("", a=1)}
"""
    (tmp_path / "tasks/odd.py").write_text(text)
    described = describe(Registry.load([tmp_path]), "odd")
    assert dict(described.options) == {"one": Option("x", ("x",))}


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


def shown(root: Path, name: str) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    code = print_show(Registry.load([root]), name, console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


@pytest.mark.usefixtures("asking")
def test_what_a_file_says_and_does_not(tmp_path: Path) -> None:
    from tests import asking_format
    from tests.checkpoints import numbers, rows

    folder = tmp_path / "registry/saes/small"
    weights = numbers(8, 16, seed=1), rows()
    asking_format.write(folder / "sae.safetensors", *weights, threshold="1", k="3", model="m")
    (folder / "x.toml").write_text(sae_entry())
    code, text = shown(tmp_path, "small/x")
    assert code == 0
    assert "the file does not say: threshold (not stored)" in text
    assert "saebench estimate" in text
    (folder / "x.toml").write_text(f"{sae_entry()}\n[semantics]\nthreshold = 0.5\n")
    code, text = shown(tmp_path, "small/x")
    assert code == 0
    assert "  the format is asking\n" in text
    assert "    pre_bias     = false   (format)\n" in text
    assert "    k            = 3       (file)\n" in text
    assert "    threshold    = 0.5     (entry)\n" in text
    assert "    trained on: model m\n" in text
    (folder / "sae.safetensors").write_bytes(b"<html>")
    code, text = shown(tmp_path, "small/x")
    assert code == 1
    assert "is a web page" in text


def test_nothing_of_an_sae_is_downloaded_to_be_shown(tmp_path: Path, hub: HubStandIn) -> None:
    folder = tmp_path / "registry/saes/small"
    folder.mkdir(parents=True)
    write_sae(random_sae(0), folder / "file")
    hub.commit("me/saes", {"a.pt": (folder / "file").read_bytes(), "cfg.json": b"{}"})
    entry = sae_entry().replace('file = "sae.safetensors"', 'hub = "me/saes"\nfilename = "a.pt"')
    (folder / "x.toml").write_text(f'{entry}\n[weights.beside]\n"cfg.json" = ""\n')
    spec = Registry.load([tmp_path]).sae("small/x")
    assert "not resolved yet" in shown(tmp_path, "small/x")[1]
    weights = wanted(spec)
    assert weights is not None
    fetch(weights)
    asked = len(hub.requests)
    assert "the format is" not in shown(tmp_path, "small/x")[1]  # a configuration is not here
    assert len(hub.requests) == asked
    for file in beside_wanted(spec).values():
        fetch(file)
    asked = len(hub.requests)
    assert "the format is saebench" in shown(tmp_path, "small/x")[1]
    assert len(hub.requests) == asked
