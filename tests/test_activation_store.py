"""`--store tokens`: a second run decodes nothing, runs no layer before its sites, moves no bit."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL.Image import Image

import saebench
from saebench import api, evaluation, runner, units
from saebench.activation_keys import Keys, Part
from saebench.activation_tables import Table, TableWriter
from saebench.backbones import Backbone, load_backbone
from saebench.cli import main
from saebench.data.shapes import Shapes
from saebench.registry import Registry
from saebench.store import Store
from tests.content import BACKBONE
from tests.small import add_sae, random_sae, setting

TASKS = ("reconstruction", "sparsity", "dead_neurons", "loss_substitution")
N, BATCH = 96, 16
SITES = """
[sites."blocks.0"]
path = "blocks.0"
width = 16
cls = 1
grid = [4, 4]
[sites.mlp]
path = "blocks.2.mlp"
kind = "branch"
width = 16
cls = 1
grid = [4, 4]
[weights]
file = "small.safetensors"
"""


READS = """
[head]
kind = "none"
features = ["cls", "patches"]
[sites.pooled]
path = "head"
side = "input"
layout = "pooled"
width = 16
[weights]
file = "small.safetensors"
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = setting(tmp_path_factory.mktemp("content"))
    (root / "registry/backbones/small.toml").write_text(BACKBONE + SITES)
    reads = BACKBONE.replace('site = "blocks.1"', 'site = "pooled"') + READS
    (root / "registry/backbones/reads.toml").write_text(reads)
    add_sae(root, "mlp", random_sae(5), site="mlp")
    add_sae(root, "first", random_sae(6), site="blocks.0")
    return root


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    return Store()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> int:
    """Segments of 32 images."""
    monkeypatch.setattr(units, "SEGMENT", 32)
    monkeypatch.setattr(evaluation, "SEGMENT", 32)
    return 32


class Work:
    """Counts images that are decoded, and that pass each block of a backbone.

    Batches of one or two are not counted: a backbone tries itself on blank images.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.decoded: dict[str, int] = {}
        self.passed: dict[str, int] = {}
        honest, load = Shapes._decode, runner.load_backbone

        def decode(shapes: Shapes, split: str, index: int) -> Image:
            self.decoded[split] = self.decoded.get(split, 0) + 1
            return honest(shapes, split, index)

        def loaded(*arguments: Any, **more: Any) -> Backbone:
            backbone = load(*arguments, **more)
            for name, module in backbone.model.module.named_modules():
                module.register_forward_pre_hook(
                    lambda module, inputs, name=name: self._pass(name, inputs)
                )
            return backbone

        patch.setattr(Shapes, "_decode", decode)
        patch.setattr(runner, "load_backbone", loaded)

    def _pass(self, name: str, inputs: Any) -> None:
        if isinstance(inputs[0], torch.Tensor) and len(inputs[0]) > 2:
            self.passed[name] = self.passed.get(name, 0) + len(inputs[0])

    def before(self, modules: Sequence[str]) -> int:
        return sum(self.passed.get(name, 0) for name in modules)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def run(root: Path | None, out: Path, **options: Any) -> pd.DataFrame:
    defaults: dict[str, Any] = {
        "backbone": "small",
        "sae": "small/a",
        "task": TASKS[:2],
        "limit": N,
        "train_limit": 32,
        "batch_size": BATCH,
        "workers": 0,
        "store": "tokens",
    }
    registry = [] if root is None else [root]
    return saebench.run(registry=registry, out=out, **{**defaults, **options})


def values(rows: pd.DataFrame) -> pd.DataFrame:
    """The measured part of rows, in a canonical order."""
    key = ["unit_id", "split", "group", "metric", "variant"]
    columns = [*key, "sae", "value", "ci_low", "ci_high", "n", "n_images", "n_skipped", "note"]
    return rows.loc[:, columns].sort_values(key).reset_index(drop=True)


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert len(found)
    pd.testing.assert_frame_equal(values(found), values(expected), check_exact=True)


def shards(store: Store) -> list[Path]:
    return sorted((store.root / "shards" / "tokens").rglob("*.safetensors"))


def fields(store: Store) -> list[dict[str, Any]]:
    folders = store.entries("shards")
    return [json.loads((folder / "manifest.json").read_text())["fields"] for folder in folders]


# --- bit for bit -------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "small": ({"sae": ("small/a", "small/cls")}, ["patch_embed", "blocks.0", "blocks.1"]),
    "a branch": ({"sae": "small/mlp"}, ["patch_embed", "blocks.0", "blocks.1"]),
    "three sites": (
        {"sae": ("small/mlp", "small/a", "small/first")},
        ["patch_embed", "blocks.0"],
    ),
    "spliced together": (
        {"sae": ("small/mlp", "small/first"), "splice_together": True},
        ["patch_embed", "blocks.0"],
    ),
    "tiny-vit": (
        {"backbone": "tiny-vit", "sae": "tiny-vit/topk-k8"},
        ["patch_embed", "blocks.0", "blocks.1", "blocks.2"],
    ),
    "what a head reads before the site": (
        {"backbone": "reads", "sae": "zero"},
        ["patch_embed", "blocks.0", "blocks.1", "blocks.2"],
    ),
    "a conv map": (
        {"backbone": "tiny-resnet", "sae": ("tiny-resnet/topk-k8", "mean")},
        ["conv1", "layer1.0", "layer2.0", "layer3.0"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_second_run_moves_no_bit_and_runs_nothing_before_its_sites(
    root: Path, store: Store, tmp_path: Path, work: Work, case: str
) -> None:
    options, before = CASES[case]
    options = {**options, "task": "loss_substitution" if "splice_together" in options else TASKS}
    streamed = run(root, tmp_path / "streamed", **options, store="none")
    assert shards(store) == []
    same(run(root, tmp_path / "first", **options), streamed)
    assert work.before(before) >= 2 * N * len(before)
    assert work.decoded["test"] == 2 * N

    work.decoded.clear()
    work.passed.clear()
    same(run(root, tmp_path / "second", **options), streamed)
    assert work.decoded == {}  # train images neither
    assert work.before(before) == 0
    assert work.passed or "blocks.2" in before  # what comes after is run, where there is anything
    assert store.verify() == []


def test_half_precision_comes_back_as_it_was(
    root: Path, store: Store, tmp_path: Path, work: Work
) -> None:
    streamed = run(root, tmp_path / "streamed", dtype="bfloat16", store="none")
    run(root, tmp_path / "first", dtype="bfloat16")
    work.decoded.clear()
    same(run(root, tmp_path / "second", dtype="bfloat16"), streamed)
    assert work.decoded == {}


def test_workers_are_not_started_for_what_lies_there(
    root: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(root, tmp_path / "first")
    monkeypatch.setattr(evaluation, "parts", None)  # a call would fail
    same(run(root, tmp_path / "second", workers=2), first)


def test_later_waves_of_a_run_read_what_the_first_kept(
    root: Path, store: Store, tmp_path: Path, work: Work
) -> None:
    found = run(root, tmp_path / "waves", sae=("small/a", "small/b"), memory="1KB")
    assert work.decoded["test"] == N
    same(found, run(root, tmp_path / "streamed", sae=("small/a", "small/b"), store="none"))


def test_what_lies_there_is_not_decoded_ahead(
    root: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    first = run(root, tmp_path / "first")
    for folder in list(store.entries("shards")):
        if '"segment": 1' in (folder / "manifest.json").read_text():
            (folder / "manifest.json").unlink()
    asked: list[list[int]] = []
    honest = evaluation.parts

    def parts(dataset: Any, split: str, positions: Any, *more: Any, **options: Any) -> Any:
        asked.append([len(part) for part in positions])
        return honest(dataset, split, positions, *more, **options)

    monkeypatch.setattr(evaluation, "parts", parts)
    same(run(root, tmp_path / "again"), first)
    assert asked == [[32]]  # and not segment 2


# --- which images ------------------------------------------------------------------------------


def test_another_batch_size_is_kept_apart(
    root: Path, store: Store, tmp_path: Path, work: Work
) -> None:
    run(root, tmp_path / "1", batch_size=32)
    work.decoded.clear()
    found = run(root, tmp_path / "2", batch_size=7)
    assert work.decoded == {"test": N}
    same(found, run(root, tmp_path / "3", batch_size=7, store="none"))


def test_a_limit_reads_what_a_longer_run_kept_up_to_the_end_of_a_batch(
    root: Path, store: Store, tmp_path: Path, work: Work, short: int
) -> None:
    run(root, tmp_path / "long")
    for limit, decoded in ((64, {}), (80, {}), (75, {"test": 11})):
        work.decoded.clear()
        found = run(root, tmp_path / str(limit), limit=limit)
        assert work.decoded == decoded
        same(found, run(root, tmp_path / f"{limit} streamed", limit=limit, store="none"))


def test_a_longer_run_reads_the_segments_of_a_shorter_one(
    root: Path, store: Store, tmp_path: Path, work: Work, short: int
) -> None:
    run(root, tmp_path / "short", limit=32 + 8)
    work.decoded.clear()
    found = run(root, tmp_path / "long")
    assert work.decoded == {"test": N - 32}
    same(found, run(root, tmp_path / "streamed", store="none"))


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the test split that do not decode."""
    rows: list[int] = []
    honest = Shapes._decode

    def decode(self: Shapes, split: str, index: int) -> Image:
        if split == "test" and index in rows:
            raise OSError("image file is truncated")
        return honest(self, split, index)

    monkeypatch.setattr(Shapes, "_decode", decode)
    return rows


def test_images_that_did_not_decode_stay_left_out(
    root: Path, store: Store, tmp_path: Path, bad: list[int], short: int
) -> None:
    from saebench.data import open_dataset

    registry = Registry.load([root])
    order = open_dataset(registry.dataset("shapes")).manifest("test").order(N)
    bad += [int(order[place]) for place in (0, 7, 8, *range(16, 32), 33)]  # a whole batch of them
    streamed = run(root, tmp_path / "streamed", bad_images="skip", store="none")
    first = run(root, tmp_path / "first", bad_images="skip")
    bad[:] = order.tolist()  # nothing decodes any more
    again = run(root, tmp_path / "again", bad_images="skip")
    for found in (first, again):
        same(found, streamed)
    assert set(again["n_skipped"]) == {20}
    lists = [(tmp_path / d / "_bad_images/shapes.csv").read_text() for d in ("streamed", "again")]
    assert sorted(lists[0].splitlines()) == sorted(lists[1].splitlines())
    assert "truncated" in lists[1]

    # Where none may be left out, what lacks some is not read.
    with pytest.warns(UserWarning, match="units failed"):
        assert run(root, tmp_path / "strict").empty
    bad.clear()
    strict = run(root, tmp_path / "strict")
    assert set(strict["n_skipped"]) == {0}
    same(strict, run(root, tmp_path / "whole", store="none"))


# --- which sites -------------------------------------------------------------------------------


def test_a_site_that_is_not_there_takes_a_pass_and_is_kept(
    root: Path, store: Store, tmp_path: Path, work: Work
) -> None:
    run(root, tmp_path / "a", sae="small/a")
    work.decoded.clear()
    both = run(root, tmp_path / "both", sae=("small/a", "small/first"))
    assert work.decoded["test"] == N
    work.decoded.clear()
    again = run(root, tmp_path / "again", sae=("small/a", "small/first"))
    same(again, both)
    run(root, tmp_path / "first", sae="small/first")
    assert work.decoded == {}


def test_what_two_sites_share_lies_there_once(root: Path, store: Store, tmp_path: Path) -> None:
    run(root, tmp_path / "r", sae=("small/a", "small/mlp"))
    # blocks.1 is what the block of the branch is given.
    kinds = sorted(one["at"]["kind"] for one in fields(store))
    assert kinds == ["boundary", "branch", "state", "state"]
    size = sum(path.stat().st_size for path in shards(store))
    tensor = N * 17 * 16 * 4
    assert 2 * tensor < size < 2.1 * tensor


# --- keys --------------------------------------------------------------------------------------


def test_whatever_can_change_an_activation_is_in_its_key(root: Path) -> None:
    registry = Registry.load([root])
    spec = registry.backbone("small")
    config = api.config_of(registry=[root], limit=N, train_limit=32)
    source = api.source_of(registry.dataset("shapes"), config)
    part = Part(0, 0, N, 1024, 64)
    ids = [f"image {i}" for i in range(1024)]

    def key(
        backbone: Any = spec,
        *,
        site: str = "blocks.1",
        source: Any = source,
        part: Part = part,
        ids: Sequence[str] = ids,
        left_out: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> str:
        keys = Keys(load_backbone(backbone, dtype=dtype), source, ids)
        return json.dumps(keys.fields(keys.key_of(site), part, left_out), sort_keys=True)

    pixels = replace(spec.input, mean=(0.4, 0.5, 0.5))
    dataset = replace(source.spec, revision="2")
    found = {
        "itself": key(),
        "site": key(site="blocks.0"),
        "branch": key(site="mlp"),
        "pixels": key(replace(spec, input=pixels)),
        "model": key(replace(spec, name="other")),
        "dataset": key(source=replace(source, spec=dataset)),
        "images": key(ids=ids[::-1]),
        "fewer": key(part=replace(part, n=64)),
        "batch": key(part=replace(part, batch=32)),
        "segment": key(part=replace(part, segment=1, start=N)),
        "dtype": key(dtype=torch.bfloat16),
        "left out": key(left_out=True),
    }
    assert len(set(found.values())) == len(found)
    assert key(ids=[*ids[:N], "another"]) == key()  # images behind the part
    assert units.backbone_identity(spec, "blocks.1")["weights"] in key()


def test_other_weights_are_not_read_from_the_store(
    tmp_path: Path, store: Store, work: Work
) -> None:
    from tests.small import save_backbone

    root = setting(tmp_path / "content")
    run(root, tmp_path / "1")
    save_backbone(root / "registry/backbones/small.safetensors", seed=1)
    work.decoded.clear()
    run(root, tmp_path / "2")
    assert work.decoded["test"] == N


# --- damage ------------------------------------------------------------------------------------


def test_a_damaged_shard_is_noticed_and_made_anew(
    root: Path, store: Store, tmp_path: Path, work: Work, short: int
) -> None:
    first = run(root, tmp_path / "first")
    for damage in (lambda b: b[:-1] + bytes([b[-1] ^ 1]), None):
        shard = max(shards(store), key=lambda path: path.stat().st_size)
        if damage is None:
            shard.unlink()
        else:
            shard.write_bytes(damage(shard.read_bytes()))
        work.decoded.clear()
        with pytest.warns(UserWarning, match="is built anew"):
            same(run(root, tmp_path / "again", overwrite="all"), first)
        assert work.decoded == {"test": 32}  # of one segment alone
        work.decoded.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(run(root, tmp_path / "again", overwrite="all"), first)
        assert work.decoded == {}


@pytest.mark.parametrize("what", ["tensors", "left_out", "sha256", "rows"])
def test_a_damaged_manifest_is_not_believed(
    root: Path, store: Store, tmp_path: Path, what: str
) -> None:
    first = run(root, tmp_path / "first")
    manifest = max(shards(store), key=lambda path: path.stat().st_size).with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace(f'"{what}"', '"nothing"'))
    if what == "rows":
        same(run(root, tmp_path / "again"), first)  # rows are counted in the shards
        return
    with pytest.warns(UserWarning, match="is built anew"):
        same(run(root, tmp_path / "again"), first)
    assert store.verify() == []


def full_disk(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A disk on which the shards of activations find no more room."""
    honest = {"write_bytes": Path.write_bytes, "rename": Path.rename}[step]
    n = [0]

    def fail(self: Path, *arguments: Any) -> Any:
        if "tokens" in self.parts:
            n[0] += 1
            if n[0] > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return honest(self, *arguments)

    monkeypatch.setattr(Path, step, fail)


@pytest.mark.parametrize("step", ["write_bytes", "rename"])
def test_a_full_disk_ends_the_keeping_and_not_the_run(
    root: Path,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    short: int,
    step: str,
) -> None:
    streamed = run(root, tmp_path / "streamed", store="none")
    with monkeypatch.context() as patch:
        full_disk(patch, step)
        with pytest.warns(UserWarning, match="not kept") as said:
            same(run(root, tmp_path / "full"), streamed)
    assert len([one for one in said if "not kept" in str(one.message)]) == 1
    assert "free some space" in str(said[0].message)
    assert list(store.root.rglob("*.tmp")) == []
    same(run(root, tmp_path / "again"), streamed)  # and what is there is whole
    assert len(fields(store)) == 2 * 3  # the tensor and the state of three segments


def test_an_exception_within_a_segment_leaves_nothing_of_it(
    root: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    honest, seen = Backbone.acts, [0]

    def acts(self: Backbone, images: torch.Tensor, sites: Any) -> Any:
        seen[0] += 1
        if seen[0] == 2 + 2 + 2:  # two train batches, one segment, and into the next
            raise KeyboardInterrupt
        return honest(self, images, sites)

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "acts", acts)
        with pytest.raises(KeyboardInterrupt):
            run(root, tmp_path / "r")
    assert {one["segment"] for one in fields(store)} == {0}
    assert list(store.root.rglob("*.tmp")) == []
    same(run(root, tmp_path / "r"), run(root, tmp_path / "streamed", store="none"))


KILLED = """
import os, signal, sys
from saebench import evaluation, units
from saebench.backbones import Backbone
units.SEGMENT = evaluation.SEGMENT = 32
honest, seen = Backbone.acts, [0]

def acts(self, images, sites):
    seen[0] += 1
    if seen[0] == 2 + 2 + 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(self, images, sites)

Backbone.acts = acts
from pathlib import Path
from tests.test_activation_store import run
run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_kill_9_within_a_segment_leaves_nothing_that_is_believed(
    root: Path, store: Store, tmp_path: Path, short: int
) -> None:
    command = [sys.executable, "-c", KILLED, str(root), str(tmp_path / "r")]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert {one["segment"] for one in fields(store)} == {0}
    assert store.verify() == []
    found = run(root, tmp_path / "r")
    same(found, run(root, tmp_path / "streamed", store="none"))
    assert {one["segment"] for one in fields(store)} == {0, 1, 2}


# --- tables ------------------------------------------------------------------------------------


def table(store: Store, tensors: Sequence[dict[str, torch.Tensor]]) -> Table:
    writer, n = TableWriter(store, {"some": "fields"}), 0
    for piece in tensors:
        b = len(next(iter(piece.values())))
        writer.append(np.arange(n, n + b), piece)
        n += b
    writer.complete({"other": "fields"}, {n: "it was truncated"})
    found = store.shards("tokens", {"other": "fields"})
    assert found is not None
    return Table(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_tensor_comes_back_to_the_bit_and_lies_in_memory_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("saebench.activation_tables.SHARD_BYTES", 1 << 12)  # several shards
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(7, 3, 4, 5, generator=generator).to(dtype)
    maps[0, 0, 0, :3] = torch.tensor([float("nan"), -0.0, float("inf")], dtype=dtype)
    forms = {
        "plain": maps,
        "channels_last": maps.to(memory_format=torch.channels_last),
        "tokens_first": maps.transpose(0, 1).contiguous().transpose(0, 1),
        "vector": maps[:, 0, 0, 0].contiguous(),
    }
    pieces = [{name: x[a:b] for name, x in forms.items()} for a, b in ((0, 1), (1, 7))]
    for name in ("plain", "channels_last"):
        pieces[0][name] = pieces[0][name].clone()
    found = table(Store(tmp_path), pieces)
    assert found.places.tolist() == list(range(7))
    assert found.left_out == {7: "it was truncated"}
    for start, stop in ((0, 7), (0, 1), (2, 5), (6, 7)):
        for name, x in found.read(start, stop).items():
            expected = forms[name][start:stop]
            assert x.dtype == dtype
            bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
            assert torch.equal(x.contiguous().view(bits), expected.contiguous().view(bits))
            axes = [axis for axis, n in enumerate(x.shape) if n > 1]
            by_stride = sorted(axes, key=lambda a: -expected.stride(a))
            assert sorted(axes, key=lambda a: -x.stride(a)) == by_stride, name


def test_two_writers_of_one_table_leave_one(tmp_path: Path) -> None:
    store, x = Store(tmp_path), torch.arange(6.0).reshape(3, 2)
    a, b = TableWriter(store, {}), TableWriter(store, {})
    for writer in (a, b):
        writer.append(np.arange(3), {"x": x})
    for writer in (a, b):
        writer.complete({}, {})
    assert len(list(store.entries("shards"))) == 1
    assert list(tmp_path.rglob("*.tmp")) == []
    found = store.shards("tokens", {})
    assert found is not None
    assert torch.equal(Table(found).read(0, 3)["x"], x)


# --- the command -------------------------------------------------------------------------------


def test_a_dry_run_says_what_it_will_take(
    root: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "run",
        "--registry",
        str(root),
        "--backbone",
        "small",
        "--out",
        str(tmp_path / "r"),
    ]
    arguments += ["--sae", "small/a", "small/mlp", "--task", "reconstruction", "--dry-run"]
    for more, said in ((["--store", "tokens"], True), ([], False)):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *more])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        # 1,024 images x 17 tokens x 16 x 4 bytes: blocks.1, the branch, what its block is given.
        assert ("activations: 0.003 GB" in shown) is said
        assert (str(store.root) in shown) is said
    assert shards(store) == []
