"""What a dry run says of the tables of probes, beside the bytes that a run really writes."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import saebench
from saebench.api import config_of, plan_run
from saebench.data import open_dataset
from saebench.probe_options import SPARSE
from saebench.probing.prober import Fits, Missing
from saebench.probing.size import ProbeSize, probe_line, probe_size
from saebench.progress import run_with_progress
from saebench.registry import Registry
from saebench.store import Store
from saebench.tensors import memory_map
from tests.content import write
from tests.small import add_sae, random_sae, setting
from tests.test_probe_options import PROBES

N = 96
COUNT, PLACE = 16, 8  # bytes of an image beside its numbers


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = setting(tmp_path_factory.mktemp("content"))
    return write(root, {"tasks/probing.py": PROBES})


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    return Store()


def asked(root: Path, tmp_path: Path, *saes: str, **options: Any) -> dict[str, Any]:
    common = {"registry": [root], "backbone": "small", "task": "probing", "train_limit": N}
    return {**common, "out": tmp_path / "results", "sae": saes, "limit": 8, **options}


def size(root: Path, tmp_path: Path, *saes: str, **options: Any) -> ProbeSize:
    config = config_of(**asked(root, tmp_path, *saes, **options))
    registry = Registry.load([root])
    return probe_size(plan_run(config, registry), registry)


def written(store: Store, kind: str) -> int:
    """Bytes of all arrays of such tables."""
    files = (store.root / "shards" / kind).rglob("*.safetensors")
    return sum(array.nbytes for file in files for array in memory_map(file).values())


@pytest.mark.parametrize("feature", ["cls", "mean", "cls+mean"])
def test_as_much_as_a_run_writes(
    root: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, feature: str
) -> None:
    """Clean features once, reconstructions of each; of codes no more than is said."""
    chosen = {"option": [f"probing.feature={feature}"]}
    saes = ("small/a", "small/b", "identity", "pca-4", "zero")
    said = size(root, tmp_path, *saes, **chosen)

    def nothing(self: Fits) -> object:
        if self.collected is None:
            raise Missing
        return object()

    monkeypatch.setattr(Fits, "probes", nothing)
    with warnings.catch_warnings():  # some places have no patches
        warnings.simplefilter("ignore")
        saebench.run(**asked(root, tmp_path, *saes, **chosen))
    assert said.images == N
    assert said.features == written(store, "probe_features") > 0
    codes = written(store, "probe_codes") + written(store, "probe_code_counts")
    assert 0 < codes <= said.codes
    if feature == "cls":  # one token of 4, 8, 4 latents, and identity at two places of 16
        assert said.codes == N * sum(8 * k + COUNT for k in (4, 8, 4, 16, 16))
        assert codes > said.codes * 0.7


def test_units_that_share_features_are_counted_once(root: Path, tmp_path: Path) -> None:
    one = size(root, tmp_path, "small/a")
    features, codes = 2 * N * (4 * 16 + PLACE), N * (8 * 4 + COUNT)
    assert replace(one, fits=0) == ProbeSize(N, features, codes, passes=1, seen=N)
    assert size(root, tmp_path, "small/a", "small/b").features == 3 * N * (4 * 16 + PLACE)
    assert size(root, tmp_path, "small/cls").features == one.features
    # Each of several shots is a sample of its own.
    few = size(root, tmp_path, "small/a", shots=[1])
    classes = len(open_dataset(Registry.load([root]).dataset("shapes")).class_names)
    assert few.features == one.features + 2 * 2 * classes * (4 * 16 + PLACE)
    assert size(root, tmp_path, "small/a", task="rows") == ProbeSize()


def test_an_sae_whose_active_latents_nobody_states(root: Path, tmp_path: Path) -> None:
    """Counted with all 48, as its file says."""
    found = size(root, tmp_path, "small/relu")
    assert found.unstated == ("small/relu",)
    assert found.codes == N * (8 * 48 + COUNT)


def test_active_latents_that_the_weights_file_alone_states(tmp_path: Path) -> None:
    root = write(setting(tmp_path), {"tasks/probing.py": PROBES})
    file = add_sae(root, "own", random_sae(5, k=6))
    found = size(root, tmp_path, "small/own")
    assert (found.codes, found.unstated) == (N * (8 * 6 + COUNT), ())
    file.write_bytes(b"damaged")  # which is said when it is loaded
    assert size(root, tmp_path, "small/own").unstated == ("small/own",)


@pytest.mark.parametrize("feature", ["cls", "cls+mean"])
def test_what_fits_take(root: Path, tmp_path: Path, feature: str) -> None:
    """Of 48 classes, 16 dimensions and 48 latents of each part; all latents of one tell nothing."""
    found = size(root, tmp_path, "small/a", option=f"probing.feature={feature}")
    parts = 1 + feature.count("+")
    c, of_few = 48, sum(k for k in SPARSE if k <= 48 * parts)
    assert found.fits == 8 * c * (2 * 16 * parts + parts * 48 * parts + of_few)


def test_each_wave_passes_over_the_train_images(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saes, console = ("small/a", "small/b"), Console(width=400)
    assert size(root, tmp_path, *saes).passes == 1
    found = size(root, tmp_path, *saes, memory="1KB", task=["rows", "probing"])
    assert (found.passes, found.seen) == (2, 2 * N)
    config = config_of(**asked(root, tmp_path, *saes, memory="1KB"), dry_run=True)
    run_with_progress(config, console, console)
    assert "up to 96 train images in 2 passes, 192 in all; features" in capsys.readouterr().out


def test_a_dry_run_says_it(
    root: Path, tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(width=400)
    config = config_of(**asked(root, tmp_path, "small/a", "small/relu"), dry_run=True)
    assert run_with_progress(config, console, console) == 0
    shown = capsys.readouterr().out
    assert "probes: up to 96 train images; features 0.000 GB" in shown
    assert "all latents of small/relu" in shown
    assert str(store.root) in shown
    without = replace(config, task=("rows",))
    assert run_with_progress(without, console, console) == 0
    assert "probes:" not in capsys.readouterr().out


def test_what_is_done_takes_nothing_more(root: Path, tmp_path: Path) -> None:
    registry = Registry.load([root])
    plan = plan_run(config_of(**asked(root, tmp_path, "small/a")), registry)
    assert probe_line(plan, registry) is not None
    assert probe_line(replace(plan, groups=()), registry) is None
