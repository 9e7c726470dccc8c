"""docs/add_an_sae.md, followed literally, on checkpoints that lie where it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import saebench
from saebench import paths
from saebench.cli import main
from saebench.formats import write_sae
from saebench.registry import Registry
from tests.checkpoints import inputs, numbers

PAGE = (paths.CONTENT / "docs/add_an_sae.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines()]


def run(line: str) -> int:
    """A command of the page; its exit status."""
    program, *arguments = shlex.split(line)
    assert program == "saebench"
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def x_nd() -> torch.Tensor:
    """[n d] activations of tiny-vit at its site, of train images."""
    from saebench.backbones import load_backbone
    from saebench.testing.report import real_images

    registry = Registry.load()
    backbone = load_backbone(registry.backbone("tiny-vit"))
    _, _, images_b3hw = real_images(backbone, registry, 64)
    return backbone.acts(images_b3hw, ["blocks.2"])["blocks.2"].acts_btd.flatten(0, 1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x_nd: torch.Tensor) -> Path:
    """A folder with `path/to/mine.safetensors`, and a file of CLIP-Scope, `path/to/theirs.pt`."""
    folder = tmp_path / "path/to"
    folder.mkdir(parents=True)
    write_sae(saebench.load_sae("tiny-vit/topk-k8"), folder / "mine.safetensors")
    # Principal directions of z-scored activations: 32 of 64 explain most, whatever they are.
    u_nd = (x_nd - x_nd.mean(dim=0)) / x_nd.std(dim=0)
    basis_dd = torch.linalg.svd(u_nd, full_matrices=False).Vh.T.contiguous()
    state = {"pre_b": torch.zeros(64), "enc": basis_dd, "dec": basis_dd.T.contiguous()}
    theirs = {"n_features": 64, "d_in": 64, "k": 32, "model_state_dict": state}
    torch.save(theirs, folder / "theirs.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    return tmp_path


def test_the_commands_in_their_order(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = blocks("text")[0]
    status = {
        "saebench new sae tiny-vit/theirs": 1,  # the page says so
        "saebench train": None,  # followed in tests/test_train_run.py
    }
    for line in commands():
        expected = next((code for start, code in status.items() if line.startswith(start)), 0)
        if expected is None:
            continue
        capsys.readouterr()
        more = " --limit 32 --train-limit 32" if " run " in line else ""
        assert run(line + more) == expected, (line, capsys.readouterr())
        if expected:
            assert capsys.readouterr().out == shown, "what the page says that is printed"
    registry = Registry.load(["my-saes"])
    assert registry.sae("tiny-vit/theirs").semantics == {
        "statistics": "theirs.statistics.safetensors"
    }
    mine = registry.sae("tiny-vit/mine")
    said = blocks("toml")[0]
    assert f'site = "{mine.site}"' in said
    assert f'tokens = "{mine.tokens}"' in said
    assert f'file = "{mine.weights.file}"' in said
    assert (here / "results/results.parquet").is_file()


def test_the_python_of_the_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = blocks("python")
    names = {"x_nd": inputs(64)}
    exec(reading, names)
    assert "input_std 2.5 given" in capsys.readouterr().out
    d, s = 8, 64
    given = {
        "W_enc_ds": numbers(d, s, seed=1),
        "b_enc_s": torch.zeros(s),
        "W_dec_sd": numbers(s, d, seed=2),
        "b_dec_d": torch.ones(d),
    }
    exec(writing, given)
    sae = saebench.load_sae(here / "mine.safetensors")
    assert (sae.k, sae.d_model) == (32, d)
    assert sae.b_pre_d is not None


def test_facts_of_the_page_are_facts_of_formats() -> None:
    source = "".join(path.read_text() for path in (paths.CONTENT / "saebench/formats").glob("*.py"))
    table = re.search(r"\| fact \| what it is \|\n\|---\|---\|\n(.*?)\n\n", PAGE, re.DOTALL)
    assert table
    named = re.findall(r"`(\w+)", "\n".join(row.split("|")[1] for row in table[1].splitlines()))
    assert {"input", "k", "threshold"} <= set(named)
    assert [name for name in named if f'"{name}"' not in source] == []
