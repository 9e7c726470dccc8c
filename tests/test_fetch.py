"""`saebench fetch`: everything that a run needs, ahead of time; afterwards nobody is asked."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from saebench import lock
from saebench.backbones import build_module
from saebench.errors import NotFound, UsageError
from saebench.fetch import fetch
from saebench.registry import Registry
from saebench.showing import print_show
from tests.hub_stand_in import HubStandIn
from tests.hub_stand_in import hub as hub

ENTRY = """\
family = "vit"
architecture = "vit"
pretraining = "none"
loader = "timm"
model = "vit_tiny_patch16_224"
model_args = {{ img_size = 32, patch_size = 8, embed_dim = 24, depth = 1, num_heads = 2 }}
site = "blocks.0"
dataset = "digits"

[weights]
{weights}

[input]
size = 32

[sites]
"blocks.0" = {{ path = "blocks.0", width = 24, cls = 1, grid = [4, 4] }}
"""


@pytest.fixture
def registry(tmp_path: Path, hub: HubStandIn) -> Registry:
    """Two backbones of repositories, the second of which is not there; and one beside its entry."""
    folder = tmp_path / "content" / "registry" / "backbones"
    folder.mkdir(parents=True)
    for name, weights in {
        "first": 'hub = "me/first"',
        "second": 'hub = "me/second"',
        "third": 'file = "third.safetensors"',
    }.items():
        (folder / f"{name}.toml").write_text(ENTRY.format(weights=weights))
    registry = Registry.load([tmp_path / "content"])
    module = build_module(registry.backbone("third"))
    assert isinstance(module, nn.Module)
    save_file(module.state_dict(), folder / "third.safetensors")
    weights = (folder / "third.safetensors").read_bytes()
    hub.commit("me/first", {"model.safetensors": weights})
    return registry


def said(registry: Registry, *patterns: str, update: bool = False) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=40)
    code = fetch(registry, patterns, console, update=update)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def test_a_line_for_each_file_and_what_was_here(registry: Registry, hub: HubStandIn) -> None:
    commit = hub.repo("me/first").refs["main"]
    size = len(hub.repo("me/first").commits[commit]["model.safetensors"])
    line = f"first   model.safetensors of me/first at {commit}   {size:,} bytes   "
    assert said(registry, "first") == (0, f"{line}fetched\n")
    asked = len(hub.requests)
    assert said(registry, "first") == (0, f"{line}here already\n")
    assert len(hub.requests) == asked


def test_configurations_of_an_sae_come_too(
    registry: Registry, hub: HubStandIn, tmp_path: Path
) -> None:
    files = {"l1/sae.pt": b"weights", "l1/cfg.json": b"{}", "config.json": b"{ }"}
    commit = hub.commit("me/saes", files)
    digest = hashlib.sha256(b"{}").hexdigest()
    saes = tmp_path / "content" / "registry" / "saes" / "first"
    saes.mkdir(parents=True)
    (saes / "a.toml").write_text(
        'backbone = "first"\nsite = "blocks.0"\n[weights]\nhub = "me/saes"\n'
        f'filename = "l1/sae.pt"\n[weights.beside]\n"cfg.json" = "{digest}"\n"../config.json" = ""'
    )
    registry = Registry.load([tmp_path / "content"])
    code, text = said(registry, "first/a")
    assert code == 0
    fetched = ["l1/sae.pt", "l1/cfg.json", "config.json"]
    assert [line.split()[1] for line in text.splitlines()] == fetched
    assert all(line.endswith("fetched") for line in text.splitlines())
    assert said(registry, "first/a")[1].count("here already") == 3
    hub.commit("me/saes", {**files, "l1/cfg.json": b"[]"})
    assert said(registry, "first/a", update=True)[0] == 1  # not what the entry declares
    assert {found.commit for found in lock.everything().values()} == {commit}


def test_a_checkpoint_by_its_address(registry: Registry, hub: HubStandIn) -> None:
    hub.commit("me/saes", {"l1/sae.pt": b"weights", "l1/config.json": b"{}"})
    code, text = said(registry, "hf-hub:me/saes/l1", "first")
    assert code == 0
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["first", "model.safetensors"],
        ["hf-hub:me/saes/l1", "l1/sae.pt"],
        ["hf-hub:me/saes/l1", "l1/config.json"],
    ]
    assert said(registry, "hf-hub:me/saes/l2")[0] == 1


def test_a_failure_leaves_the_others(registry: Registry, hub: HubStandIn) -> None:
    code, text = said(registry, "second", "*ir*", "digits")
    assert code == 1
    lines = text.splitlines()
    assert lines[0].startswith("error: second: model.safetensors or pytorch_model.bin of me/second")
    assert lines[2].startswith("first   model.safetensors of me/first")
    assert lines[3].startswith("third   ")
    assert lines[3].endswith("here already")
    assert lines[4] == "digits   a dataset that needs no download   here already"


def test_what_no_entry_is_called(registry: Registry, hub: HubStandIn) -> None:
    with pytest.raises(NotFound, match=r"(?s)no entry is called 'frist'.*did you mean first"):
        said(registry, "first", "frist")
    with pytest.raises(UsageError, match="saebench fetch NAME"):
        said(registry)
    assert lock.everything() == {}


def test_update_asks_anew(registry: Registry, hub: HubStandIn) -> None:
    said(registry, "first")
    old = hub.repo("me/first").refs["main"]
    new = hub.commit("me/first", {"model.safetensors": b"other weights"})
    assert old in said(registry, "first")[1]
    assert new in said(registry, "first", update=True)[1]
    assert {found.commit for found in lock.everything().values()} == {new}


def test_an_update_that_fails_keeps_what_was_locked(registry: Registry, hub: HubStandIn) -> None:
    said(registry, "first")
    before = lock.everything()
    hub.repo("me/first").gated = True
    hub.commit("me/first", {"model.safetensors": b"other weights"})
    assert said(registry, "first", update=True)[0] == 1
    assert lock.everything() == before


@pytest.mark.parametrize("where", ["get_hf_file_metadata", "hf_hub_download"])
def test_an_update_that_is_stopped_keeps_what_was_locked(
    where: str, registry: Registry, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    said(registry, "first")
    before = lock.lock_path().read_bytes()
    hub.commit("me/first", {"model.safetensors": b"other weights"})

    def stopped(*_: Any, **__: Any) -> NoReturn:
        assert lock.lock_path().read_bytes() == before  # nor would a kill change it
        raise KeyboardInterrupt

    monkeypatch.setattr(f"huggingface_hub.{where}", stopped)
    with pytest.raises(KeyboardInterrupt):
        said(registry, "first", update=True)
    assert lock.lock_path().read_bytes() == before


def test_an_update_that_can_ask_nobody_is_none(
    registry: Registry, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cache last saw may be what another program fetched since, or long ago."""
    from huggingface_hub import hf_hub_download

    said(registry, "first")
    before = lock.lock_path().read_bytes()
    hub.commit("me/first", {"model.safetensors": b"other weights"})
    hf_hub_download("me/first", "model.safetensors")
    hub.use(monkeypatch, tmp_path, offline=True)
    code, text = said(registry, "first", update=True)
    assert code == 1
    assert "HF_HUB_OFFLINE is set" in text
    assert lock.lock_path().read_bytes() == before


def test_an_update_says_what_else_moves(
    registry: Registry, hub: HubStandIn, tmp_path: Path
) -> None:
    saes = tmp_path / "content" / "registry" / "saes" / "first"
    saes.mkdir(parents=True)
    for name in "abcd":
        weights = f'[weights]\nhub = "me/saes"\nfilename = "{name}.safetensors"\n'
        tag = 'revision = "v1"\n' if name == "d" else ""
        (saes / f"{name}.toml").write_text(f'backbone = "first"\nsite = "blocks.0"\n{weights}{tag}')
    registry = Registry.load([tmp_path / "content"])
    first = hub.commit("me/saes", {f"{name}.safetensors": b"1" + name.encode() for name in "abcd"})
    hub.repo("me/saes").refs["v1"] = first
    said(registry, "first/*")
    second = hub.commit("me/saes", {f"{name}.safetensors": b"2" + name.encode() for name in "ab"})
    code, text = said(registry, "first/a", update=True)
    assert code == 0
    assert text.splitlines()[1:] == [
        f"also moves: first/{name}   {name}.safetensors of me/saes; "
        f"get it by  saebench fetch first/{name}"
        for name in "bc"
    ]
    locked = {asked.file[0]: found for asked, found in lock.everything().items()}
    assert {name: found.commit for name, found in locked.items()} == {
        "a": second,
        "b": second,  # c is no more
        "d": first,  # at a tag
    }
    assert locked["b"].sha256 == hashlib.sha256(b"2b").hexdigest()
    said(registry, "first/b")
    hub.commit("me/saes", {f"{name}.safetensors": b"3" + name.encode() for name in "ab"})
    assert "also moves" not in said(registry, "first/a", "first/b", update=True)[1]


def test_show_says_where_weights_are_and_fetches_nothing(
    registry: Registry, hub: HubStandIn
) -> None:
    def shown(name: str) -> str:
        console = Console(file=io.StringIO(), width=300)
        assert print_show(registry, name, console) == 0
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    assert "not resolved yet" in shown("first")
    assert hub.requests == []
    said(registry, "first")
    asked = len(hub.requests)
    assert "as locked" in shown("first")
    assert len(hub.requests) == asked


@pytest.mark.slow
def test_after_a_fetch_a_run_asks_nobody(
    registry: Registry, hub: HubStandIn, tmp_path: Path
) -> None:
    def command(*arguments: str, **environment: str) -> str:
        registry = ["--registry", str(tmp_path / "content")]
        done = subprocess.run(
            [sys.executable, "-m", "saebench", *arguments, *registry],
            env=hub.env(tmp_path, SAEBENCH_STORE=str(tmp_path / "store"), **environment),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "fetched" in command("fetch", "first")
    hub.requests.clear()
    options = ("--backbone", "first", "--sae", "identity", "--task", "reconstruction")
    out = ("--limit", "64", "--train-limit", "64", "--out", str(tmp_path / "results"))
    command("run", *options, *out, HF_HUB_OFFLINE="1")
    assert hub.requests == []
    import pandas as pd

    table = pd.read_parquet(tmp_path / "results" / "results.parquet")
    commit = hub.repo("me/first").refs["main"]
    assert set(table["backbone_revision"]) == {commit}
    locked = json.loads((tmp_path / "config" / "saebench.lock").read_text())["files"]
    assert set(table["backbone_sha256"]) == {line["found"]["sha256"] for line in locked}
