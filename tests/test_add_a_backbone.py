"""docs/add_a_backbone.md, followed literally: its files written, its commands run."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save, save_file

from saebench import paths
from saebench.backbones import build_module, load_backbone, stepped
from saebench.backbones.activations import check_activations
from saebench.backbones.checks import check_entry
from saebench.cli import main
from saebench.registry import Registry
from saebench.testing import Check, check_backbone
from tests.backbone_cases import randomise
from tests.hub_stand_in import HubStandIn, hub  # noqa: F401 (a fixture)

PAGE = (paths.CONTENT / "docs/add_a_backbone.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files, each where its first line says, and some photographs of seven classes."""
    for block in (*blocks("toml"), *blocks("python")):
        if named := re.match(r"# (mine/\S+)\n", block):
            file = tmp_path / named.group(1)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block)
    rng = np.random.default_rng(0)
    for label in "abcdefg":
        folder = tmp_path / "mine/photos" / label
        folder.mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{label}{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine"


def run(line: str) -> int:
    """A command of the page; its exit status."""
    program, *arguments = shlex.split(line)
    assert program == "saebench"
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def checks_of(mine: Path, name: str) -> list[Check]:
    checks = list(check_backbone(Registry.load([mine]), name))
    assert all(check.passed for check in checks), checks
    return checks


def commands(word: str) -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(f"saebench {word}")]


def test_the_page_has_what_is_followed_here(mine: Path) -> None:
    entries = {path.stem for path in mine.glob("registry/backbones/*.toml")}
    assert entries == {"my-dinov2", "my-clip-tuned", "my-hub-model", "my-net"}
    assert len(commands("check")) == 1
    assert len(commands("new")) == 2


def test_a_fine_tune_in_ten_lines(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = mine / "registry/backbones/my-dinov2.toml"
    lines = [line for line in entry.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 10

    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=7)
    randomise(model).eval()
    save_file(model.state_dict(), entry.with_name("my-dinov2.safetensors"))
    assert run(*commands("check")) == 0
    (shown,) = [block for block in blocks("text") if block.startswith("ok   builds")]
    assert capsys.readouterr().out == shown, "what the page says that the check prints"

    images = torch.randn(2, 3, 224, 224)
    backbone = load_backbone(Registry.load([mine]).backbone("my-dinov2"))
    with torch.inference_mode():
        logits = backbone.forward(images).logits_bc
        assert logits is not None
        assert torch.equal(logits, model(images))


def test_entries_that_are_written(mine: Path) -> None:
    first, second = commands("new")
    assert run(first) == 0
    spec = Registry.load([mine]).backbone("my-vit")
    assert spec.weights.hub == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert spec.head.classes == {"imagenet-1k": (0, 1000)}
    assert run(second) == 0
    assert Registry.load([mine]).backbone("my-clip").model == "ViT-B-32-quickgelu"


def test_a_checkpoint_of_open_clip_fits_its_model(mine: Path) -> None:
    spec = Registry.load([mine]).backbone("my-clip-tuned")
    model = stepped(build_module(spec), spec)  # type: ignore[arg-type]
    check_entry(spec, model)
    check_activations(spec, model)


@pytest.mark.slow
def test_a_checkpoint_of_open_clip(mine: Path) -> None:
    """As open_clip's training writes it, through DDP."""
    spec = Registry.load([mine]).backbone("my-clip-tuned")
    model: Any = open_clip.create_model(spec.model)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    assert spec.weights.file is not None
    torch.save(
        {"epoch": 10, "name": "mine", "state_dict": state, "optimizer": {"state": {}}},
        Path(spec.path).parent / spec.weights.file,
    )
    checks_of(mine, "my-clip-tuned")
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        embedding = load_backbone(spec).forward(images).embedding_bd
        assert torch.equal(embedding, model.eval().encode_image(images))


def test_a_repository_of_the_hub(mine: Path, hub: HubStandIn) -> None:  # noqa: F811
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    pretrained = {"input_size": [3, 224, 224], "num_classes": 0, "classifier": "head"}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "pretrained_cfg": pretrained,
    }
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(model.state_dict()),
    }
    hub.commit("me/my-model", files)
    checks_of(mine, "my-hub-model")


def test_a_loader_of_ones_own(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(mine))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    from my_models import Net  # type: ignore[import-not-found]

    torch.manual_seed(0)
    net = Net(7).eval()
    save_file(net.state_dict(), mine / "registry/backbones/my-net.safetensors")
    names = [check.name for check in checks_of(mine, "my-net")]
    assert "site blocks.1: resume gives the full forward's output" in names

    # The page's own last lines.
    import saebench.backbones

    (code,) = [block for block in blocks("python") if "saebench.backbones.load_backbone" in block]
    spec = Registry.load([mine]).backbone("my-net")
    names_there = {"saebench": saebench, "torch": torch, "spec": spec, "net": net}
    with torch.inference_mode():
        exec(code, names_there | {"x": torch.randn(2, 3, 64, 64)})


def test_a_model_that_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "timm:swin_tiny_patch4_window7_224.ms_in1k"
    assert run(f"saebench new backbone x --from {source} --out {tmp_path}") == 2
    message = "the forward pass of 'swin_tiny_patch4_window7_224' (SwinTransformer) is not known"
    assert message in PAGE
    assert message in capsys.readouterr().err
