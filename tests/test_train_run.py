"""`saebench train` from names to entries, on a small real backbone and real images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from saebench.errors import Mismatch, NonFiniteError, NotFound, UsageError
from saebench.formats import read_entry, read_sae, write_sae
from saebench.registry import Registry
from saebench.train import TrainConfig, run, train, train_with_progress
from saebench.train.config import Start, recipes
from saebench.train.entry import write_entry
from saebench.train.recipe import Recipe
from saebench.train.run import Watch
from saebench.train.trainee import Trainee
from saebench.weights import file_sha256
from tests.small import (
    LATENTS,
    TOKENS,
    WIDTH,
    activations,
    add_sae,
    random_sae,
    save_backbone,
    setting,
)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return setting(tmp_path_factory.mktemp("content"))


def config(content: Path, out: Path, **fields: object) -> TrainConfig:
    values = {
        "backbone": "small",
        "registry": (str(content),),
        "out": str(out),
        "train_limit": 64,
        "k": (4,),
        "d_sae": 32,
        "steps": 40,
        "batch_rows": 128,
        "device": "cpu",
    }
    return TrainConfig(**{**values, **fields})  # type: ignore[arg-type]


def test_settings_architectures_and_seeds_in_one_call(content: Path, tmp_path: Path) -> None:
    found = train(
        config(content, tmp_path, arch=("topk", "jumprelu"), k=(4, 8), seed=(0, 1), steps=10)
    )
    assert {sae.name for sae in found} == {
        f"small/{stem}{k}{seed}"
        for stem in ("topk-k", "jumprelu-l0-")
        for k in (4, 8)
        for seed in ("", "-s1")
    }
    assert not (tmp_path / "_training").exists()  # no checkpoint stays behind


def test_the_entry_says_how_it_was_made_and_is_found(content: Path, tmp_path: Path) -> None:
    (made,) = train(config(content, tmp_path, seed=(3,), tokens="patches"))
    registry = Registry.load([content, tmp_path])
    spec = registry.sae("small/patches-topk-k4-s3")
    assert made.path == tmp_path / "saes/small/patches-topk-k4-s3.toml"
    assert (spec.backbone, spec.site, spec.tokens) == ("small", "blocks.1", "patches")
    assert (spec.architecture, spec.seed, spec.trained_on) == ("topk", 3, "shapes/train[:64]")
    assert spec.recipe == made.recipe.title
    assert made.measured is not None
    assert made.measured.n_rows == 64 * (TOKENS - 1)
    assert spec.l0 == round(made.measured.l0, 2)
    assert f"fvu {made.measured.fvu:.4f}" in spec.description
    sae = read_entry(spec)  # checks the sha256
    assert (sae.d_model, sae.d_sae, sae.k) == (WIDTH, 32, 4)
    with safe_open(made.path.with_suffix(".safetensors"), "np") as file:
        extra = json.loads(file.metadata()["config"])["extra"]
    assert extra["training"] == {**made.recipe.plain(), "version": 1}
    assert extra["site"] == "blocks.1"


def test_the_measured_fvu_is_that_of_the_activations(content: Path, tmp_path: Path) -> None:
    """Against a plain forward hook of timm; float16 weights are measured as they are saved."""
    (made,) = train(config(content, tmp_path, save_dtype="float16"))
    x = activations(content, "shapes", "train", 64).reshape(-1, WIDTH)
    sae = read_sae(made.path.with_suffix(".safetensors"))
    assert sae.stored_dtype == "float16"
    recon = sae.decode(sae.encode(torch.from_numpy(x))).double().numpy()
    x = x.astype(np.float64)
    fvu = ((x - recon) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert made.measured is not None
    assert made.measured.fvu == pytest.approx(fvu, rel=1e-4)
    assert fvu < 0.9


def test_what_is_there_is_not_trained_again(content: Path, tmp_path: Path) -> None:
    one = config(content, tmp_path, steps=5)
    first = train(one)[0]
    weights = first.path.with_suffix(".safetensors")
    before = weights.stat().st_mtime_ns
    assert train(one)[0].measured is None
    both = train(replace(one, k=(4, 8)))
    assert [sae.measured is None for sae in both] == [True, False]
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"made in another way(.|\n)*--overwrite"):
        train(replace(one, steps=6))
    assert train(replace(one, steps=6, overwrite=True))[0].measured is not None
    weights.write_bytes(weights.read_bytes()[:-8])  # damaged: made again
    assert train(replace(one, steps=6))[0].measured is not None


def test_what_changes_the_sae_is_another_sae(tmp_path: Path) -> None:
    content = setting(tmp_path / "content")
    one = config(content, tmp_path / "out", steps=5)
    train(one)

    def is_there(**fields: object) -> bool:
        return train(replace(one, **fields))[0].measured is None  # type: ignore[arg-type]

    assert is_there(batch_size=7, workers=0, memory="1GiB", licence="MIT", checkpoint_minutes=1)
    with pytest.raises(UsageError, match=r"another save_dtype\).*(.|\n)*--overwrite"):
        is_there(save_dtype="float16")
    with pytest.raises(UsageError, match=r"another window\)"):
        is_there(memory=f"{20 * TOKENS * (4 * WIDTH + 8)}B")  # windows are shuffled otherwise
    save_backbone(content / "registry/backbones/small.safetensors", seed=1)
    with pytest.raises(UsageError, match=r"another backbone\)"):
        is_there()
    save_backbone(content / "registry/backbones/small.safetensors")
    assert is_there()
    entry = content / "registry/backbones/small.toml"
    entry.write_text(entry.read_text().replace('path = "blocks.1"', 'path = "blocks.2"'))
    with pytest.raises(UsageError, match=r"another backbone\)"):
        is_there()


def test_a_start_is_the_same_by_name_and_by_path(content: Path, tmp_path: Path) -> None:
    one = config(content, tmp_path, init="small/a", k=(), d_sae=None, steps=1)
    train(one)
    folder = content / "registry/saes/small"
    for init in (folder / "a.toml", folder / "a.safetensors"):
        assert train(replace(one, init=str(init)))[0].measured is None
    other = tmp_path / "other" / "a.safetensors"
    other.parent.mkdir()
    write_sae(random_sae(9), other)
    with pytest.raises(UsageError, match="made in another way"):
        train(replace(one, init=str(other)))


def test_another_parent_makes_another_sae(tmp_path: Path) -> None:
    content = setting(tmp_path / "content")
    one = config(content, tmp_path / "out", backbone="", on="sae:small/a", steps=2)
    train(one)
    assert train(one)[0].measured is None
    add_sae(content, "a", random_sae(9), l0=4.0)
    with pytest.raises(UsageError, match=r"another parents\)"):
        train(one)


def test_a_file_without_an_identity_is_held_to_its_entry(content: Path, tmp_path: Path) -> None:
    one = config(content, tmp_path, steps=5)
    (made,) = train(one)
    weights = made.path.with_suffix(".safetensors")
    before = file_sha256(weights)
    sha256 = write_sae(read_sae(weights), weights, extra={"training": made.recipe.plain()})
    made.path.write_text(made.path.read_text().replace(before, sha256))
    assert train(replace(one, save_dtype="float16"))[0].measured is None
    with pytest.raises(UsageError, match="made in another way"):
        train(replace(one, steps=6))


def test_a_kill_while_entries_are_written_costs_none_of_the_rest(
    content: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps_of(call: TrainConfig) -> list[int]:
        class Counting(Watch):
            def step(self, done: int, trainees: object) -> None:
                seen.append(done)

        seen: list[int] = []
        train(call, Counting())
        return seen

    class Killed(Exception):
        pass

    written: list[Path] = []

    def killed_at_the_second(path: Path, *rest: object) -> None:
        written.append(path)
        if len(written) == 2:
            raise Killed
        write_entry(path, *rest)  # type: ignore[arg-type]

    one = config(content, tmp_path / "killed", k=(4, 8), seed=(0, 1), steps=20)
    monkeypatch.setattr(run, "write_entry", killed_at_the_second)
    with pytest.raises(Killed):
        train(one)
    monkeypatch.undo()
    (checkpoint,) = (tmp_path / "killed/_training").iterdir()
    kept = checkpoint.read_bytes()
    first = written[0].with_suffix(".safetensors")
    before = first.stat().st_mtime_ns
    assert steps_of(one) == []  # nothing is trained again
    assert first.stat().st_mtime_ns == before
    assert not checkpoint.parent.exists()

    undisturbed = train(replace(one, out=str(tmp_path / "whole")))
    assert len(undisturbed) == 4
    for sae in undisturbed:
        files = [sae.path.with_suffix(".safetensors"), sae.path]
        for file in files:
            twin = tmp_path / "killed" / file.relative_to(tmp_path / "whole")
            assert twin.read_bytes() == file.read_bytes()

    # A kill after the last entry leaves a checkpoint that nothing needs any more.
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(kept)
    assert steps_of(one) == []
    assert not checkpoint.parent.exists()


def test_one_that_diverges_leaves_the_others(
    content: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k = 8 gets NaN for its fourth rows, as overflow would."""
    one = config(content, tmp_path / "both", k=(4, 8), steps=6)
    (alone,) = train(config(content, tmp_path / "alone", k=(4,), steps=6))
    step = Trainee.step

    def poisoned(self: Trainee, x_nd: torch.Tensor) -> None:
        bad = self.recipe.k == 8 and self.step_count == 3
        step(self, x_nd * float("nan") if bad else x_nd)

    monkeypatch.setattr(Trainee, "step", poisoned)
    console = Console(record=True, width=120)
    assert train_with_progress(one, console) == 1
    text = console.export_text()
    assert "small/topk-k8: training of topk-k8 diverged at step 3" in text
    assert "--lr" in text
    folder = tmp_path / "both/saes/small"
    assert sorted(path.name for path in folder.iterdir()) == [
        "topk-k4.safetensors",
        "topk-k4.toml",
    ]
    assert (folder / "topk-k4.toml").read_bytes() == alone.path.read_bytes()
    assert not (tmp_path / "both/_training").exists()
    with pytest.raises(NonFiniteError, match="diverged at step 3"):  # none is left
        train(one)


def test_an_sae_on_an_sae(content: Path, tmp_path: Path) -> None:
    (made,) = train(config(content, tmp_path, backbone="", on="sae:small/a", d_sae=None))
    assert made.name == "small/on-a-topk-k4"
    spec = Registry.load([content, tmp_path]).sae(made.name)
    assert (spec.backbone, spec.site) == ("small", "sae:small/a/codes")
    sae = read_entry(spec)
    assert (sae.d_model, sae.d_sae) == (LATENTS, 8 * LATENTS)
    below = read_sae(content / "registry/saes/small/a.safetensors")
    x = torch.from_numpy(activations(content, "shapes", "train", 64).reshape(-1, WIDTH))
    codes_ns = below.encode(x).dense()
    error = (codes_ns - sae.decode(sae.encode(codes_ns))).double().square().sum()
    total = (codes_ns - codes_ns.mean(0)).double().square().sum()
    assert made.measured is not None
    assert made.measured.fvu == pytest.approx(float(error / total), rel=1e-3)


@pytest.mark.parametrize("how", ["name", "entry", "weights"])
def test_starting_from_an_sae(content: Path, tmp_path: Path, how: str) -> None:
    """With a rate of almost nothing, what comes out is what went in."""
    folder = content / "registry/saes/small"
    init = {"name": "small/a", "entry": str(folder / "a.toml")}.get(
        how, str(folder / "a.safetensors")
    )
    (made,) = train(config(content, tmp_path, init=init, k=(), d_sae=None, lr=1e-12, steps=1))
    assert made.name == "small/from-a-topk-k4"
    before = read_sae(folder / "a.safetensors")
    after = read_sae(made.path.with_suffix(".safetensors"))
    x_nd = torch.from_numpy(activations(content, "shapes", "train", 16).reshape(-1, WIDTH))
    torch.testing.assert_close(
        after.decode(after.encode(x_nd)), before.decode(before.encode(x_nd)), atol=1e-4, rtol=1e-4
    )
    assert made.recipe.init


def test_windows_and_several_datasets_bound_the_memory(content: Path, tmp_path: Path) -> None:
    rows = 20 * TOKENS * (4 * WIDTH + 8)  # 20 images at once
    (made,) = train(
        config(content, tmp_path, dataset=("shapes", "digits"), memory=f"{rows}B", train_limit=40)
    )
    assert made.measured is not None
    assert made.measured.n_rows == 20 * TOKENS
    spec = Registry.load([content, tmp_path]).sae(made.name)
    assert spec.trained_on == "shapes/train[:40]+digits/train[:40]"


def test_bad_input(content: Path, tmp_path: Path) -> None:
    def fails(error: type[Exception], match: str, **fields: object) -> None:
        with pytest.raises(error, match=match):
            train(config(content, tmp_path, **fields))

    fails(NotFound, "small", backbone="smal")
    fails(UsageError, "--backbone", backbone="")
    fails(Mismatch, r"no site 'blocks.7'(.|\n)*blocks.1", site="blocks.7")
    fails(Mismatch, "registers", tokens="registers")
    fails(NotFound, "imagenet", dataset=("imagenet",))
    fails(NotFound, "small/a", on="sae:small/aa", backbone="")
    fails(Mismatch, "not on 'tiny-vit'", on="sae:small/a", backbone="tiny-vit")
    fails(UsageError, "those of the SAE below", on="sae:small/a", site="blocks.1")
    fails(Mismatch, "48 dimensions", init="small/meta", d_sae=None)
    fails(UsageError, "cannot start a relu", init="small/a", arch=("relu",), d_sae=None)
    fails(UsageError, "48 latents, not 32", init="small/a")
    fails(UsageError, "32 of 32 latents", k=(32,))
    fails(UsageError, "--steps 0", steps=0)
    fails(UsageError, "--lr", lr=float("nan"))
    fails(UsageError, "--seed", seed=(-1,))
    fails(UsageError, "--memory", memory="much")
    for name in ("../../esc", "/esc", "a/../../../esc", "a b", ".."):
        fails(UsageError, "cannot be an entry's name", name=name)
    fails(UsageError, r"already an SAE called 'small/a'", name="a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        train(config(content, tmp_path / "file"))


def test_activations_that_are_not_finite(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    content = setting(tmp_path / "content")
    path = content / "registry/backbones/small.safetensors"
    save_backbone(path)
    state = load_file(path)
    state["blocks.1.mlp.fc2.bias"][:] = 3e38
    state["blocks.1.mlp.fc2.weight"][:] = 3e38
    save_file(state, path)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        train(config(content, tmp_path / "out"))


def test_the_command_prints_what_was_measured(content: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    one = config(content, tmp_path, arch=("relu",), l0=(2.0,), k=(), steps=3)
    assert train_with_progress(one, console) == 0
    text = console.export_text()
    assert "small/relu-l0-2" in text
    assert "give it more --steps" in text  # three steps reach no target
    assert f"saebench run --registry {tmp_path}" in text


def test_recipes_take_what_is_given_and_fill_in_the_rest() -> None:
    def made(**fields: object) -> list[Recipe]:
        return recipes(TrainConfig(backbone="b", **fields), 64)  # type: ignore[arg-type]

    assert [r.setting for r in made()] == ["topk-k32"]
    assert made()[0].d_sae == 512
    assert made(d_sae=16384)[0].lr == pytest.approx(2e-4)
    settings = [r.setting for r in made(arch=("batchtopk", "relu"), k=(4, 8), seed=(0, 2))]
    assert settings == [
        "batchtopk-k4",
        "batchtopk-k8",
        "batchtopk-k4-s2",
        "batchtopk-k8-s2",
        "relu-l0-4",
        "relu-l0-8",
        "relu-l0-4-s2",
        "relu-l0-8-s2",
    ]
    assert [r.setting for r in made(arch=("relu",), l0=(4.5,))] == ["relu-l0-4.5"]
    start = Start("batchtopk", 9, 100, "hash")
    (adapted,) = recipes(TrainConfig(backbone="b"), 64, start)
    assert (adapted.arch, adapted.k, adapted.d_sae, adapted.init) == ("batchtopk", 9, 100, "hash")


def test_a_title_tells_recipes_apart_and_not_seeds() -> None:
    base = Recipe(arch="topk", k=4, d_sae=64, steps=10, batch_rows=8, lr=1e-3)
    assert base.title == replace(base, seed=5).title
    assert base.title != replace(base, aux=0.1).title
    assert base.title.startswith("saebench train 1: topk-k4, s = 64, 10 x 8 rows, lr 0.001 [")
