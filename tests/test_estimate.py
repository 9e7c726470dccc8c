"""`saebench estimate`: facts that a file lacks, from train activations, held to NumPy's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest
import torch

import saebench
from saebench import cli, trainfacts
from saebench.errors import Mismatch, SpecError, UsageError, WriteError
from saebench.estimate import Estimated, estimate
from saebench.formats.facts import Estimate
from saebench.formats.statistics import origins_of, read_statistics
from saebench.registry import Registry
from saebench.tomledit import with_key
from tests import asking_format
from tests.asking_format import asking as asking
from tests.checkpoints import numbers, rows
from tests.content import sae_entry
from tests.small import LATENTS, WIDTH, activations, setting

pytestmark = pytest.mark.usefixtures("asking")

N = 96  # images; 1,632 rows of all tokens


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return setting(tmp_path_factory.mktemp("content"))


@pytest.fixture(scope="module")
def acts_ntd(root: Path) -> np.ndarray:
    """[n t d] float64 of the first train images."""
    return activations(root, "shapes", "train", N).astype(np.float64)


def entry(root: Path, name: str, semantics: str = "", tokens: str = "all", **meta: str) -> Path:
    """An entry of a checkpoint that has to be told what `meta` says."""
    folder = root / "registry/saes/small"
    W_ds, D_sd = numbers(WIDTH, LATENTS, seed=2), rows(LATENTS, WIDTH)
    asking_format.write(folder / f"{name}.safetensors", W_ds, D_sd, **meta)
    text = sae_entry(tokens=tokens).replace("sae.safetensors", f"{name}.safetensors")
    path = folder / f"{name}.toml"
    path.write_text(f"# Mine.\n{text}  # here\n{semantics}")
    return path


def found(root: Path, name: str, **options: Any) -> Estimated:
    return estimate(Registry.load([root]), f"small/{name}", images=N, device="cpu", **options)


def expected(how: str, x: np.ndarray) -> tuple[np.ndarray | float, np.ndarray | float]:
    mean, d = x.mean(axis=0), x.shape[1]
    if how == "standardise":
        return mean, np.sqrt(x.var(axis=0).mean())
    if how == "zscore":
        return mean, x.std(axis=0, ddof=1) + 1e-6
    if how == "mean_norm":
        return mean, np.linalg.norm(x - mean, axis=1).mean() / np.sqrt(d)
    return 0.0, np.linalg.norm(x, axis=1).mean() / np.sqrt(d)


@pytest.mark.parametrize("how", ["standardise", "zscore", "mean_norm", "norm"])
@pytest.mark.parametrize("tokens", ["all", "cls"])
def test_scalings(root: Path, acts_ntd: np.ndarray, how: Estimate, tokens: str) -> None:
    path = entry(root, f"{how}-{tokens}", tokens=tokens, scaling=how)
    done = found(root, f"{how}-{tokens}")
    x = acts_ntd[:, :1] if tokens == "cls" else acts_ntd
    mean, std = expected(how, x.reshape(-1, WIDTH))
    facts = read_statistics(done.statistics)
    np.testing.assert_allclose(facts.get("input_mean", torch.tensor(0.0)), mean, atol=2e-5)
    np.testing.assert_allclose(facts["input_std"], std, rtol=2e-5)
    assert set(facts) == ({"input_std"} if how == "norm" else {"input_mean", "input_std"})
    spec = Registry.load([root]).sae(f"small/{how}-{tokens}")
    assert spec.semantics == {"statistics": f"{how}-{tokens}.statistics.safetensors"}
    assert path.read_text().startswith("# Mine.\n")


@pytest.mark.parametrize("rows_of_a_batch", [500, 4096])
def test_a_threshold(
    root: Path, acts_ntd: np.ndarray, rows_of_a_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the scaled input, where that is missing too; in whole batches of rows, or all rows."""
    monkeypatch.setattr(trainfacts, "ROWS", rows_of_a_batch)
    name = f"both-{rows_of_a_batch}"
    entry(root, name, scaling="zscore", threshold="1", k="5")
    done = found(root, name)
    x = acts_ntd.reshape(-1, WIDTH)
    mean, std = expected("zscore", x)
    pre = np.maximum((x - mean) / std @ numbers(WIDTH, LATENTS, seed=2).double().numpy(), 0)
    cut = [pre[i : i + rows_of_a_batch] for i in range(0, len(pre), rows_of_a_batch)]
    whole = [batch for batch in cut if len(batch) == rows_of_a_batch] or [pre]
    least = [np.sort(batch, axis=None)[-5 * len(batch)] for batch in whole]
    np.testing.assert_allclose(done.facts["threshold"], np.mean(least), rtol=1e-4)
    # What it keeps of the whole is about what it was made to keep.
    assert abs(done.l0 - 5) < 0.2
    l0 = (pre >= float(done.facts["threshold"])).sum() / len(pre)
    assert abs(done.l0 - l0) < 0.01
    sae = saebench.load_sae(f"small/{name}", registry=root)
    assert sae.record.estimated == ("input_mean", "input_std", "threshold")


def test_what_it_does_afterwards(root: Path, acts_ntd: np.ndarray) -> None:
    entry(root, "after", threshold="1", k="4")
    done = found(root, "after")
    x = acts_ntd.reshape(-1, WIDTH)
    pre = x @ numbers(WIDTH, LATENTS, seed=2).double().numpy()
    z = np.where(pre >= float(done.facts["threshold"]), pre, 0)
    gap = x - z @ rows(LATENTS, WIDTH).double().numpy()
    fvu = (gap**2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert done.fvu == pytest.approx(fvu, rel=1e-3)
    assert done.l0 == pytest.approx((z > 0).sum() / len(x), rel=1e-3)


def test_fewer_positive_latents_than_a_batch_keeps(root: Path) -> None:
    entry(root, "all", threshold="1", k=str(LATENTS))
    assert float(found(root, "all").facts["threshold"]) == 0


def test_where_it_comes_from(root: Path) -> None:
    entry(root, "origin", threshold="1", k="4")
    done = found(root, "origin", dataset="shapes")
    said = origins_of(done.statistics)["threshold"]
    assert said == done.origin
    assert (said["backbone"], said["site"], said["tokens"]) == ("small", "blocks.1", "all")
    assert (said["dataset"], said["split"], said["images"]) == ("shapes", "train", str(N))
    assert (said["k"], said["saebench_version"]) == ("4", saebench.__version__)
    assert len(said["manifest"]) == 64


def test_k_is_asked_for_where_nobody_says_it(root: Path) -> None:
    entry(root, "no-k", threshold="1")
    with pytest.raises(UsageError, match="saebench estimate small/no-k --k K"):
        found(root, "no-k")
    assert abs(found(root, "no-k", k=3).l0 - 3) < 0.2
    entry(root, "has-k", threshold="1", k="4")
    with pytest.raises(UsageError, match=r"--k 3, and its file or entry says k = 4"):
        found(root, "has-k", k=3)


def test_what_activations_do_not_tell(root: Path) -> None:
    path = entry(root, "norm", threshold="1", k="4", norm="1")
    with pytest.raises(SpecError, match=r"(?s)do not tell: dictionary_norm.*\"l2\" | \"identity\""):
        found(root, "norm")
    entry(root, "scaled", scaled="1")
    with pytest.raises(SpecError, match="do not tell: input"):
        found(root, "scaled")
    path.write_text(
        path.read_text() + '\n[semantics]\ndictionary_norm = "l2"  # as its maker says\n'
    )
    found(root, "norm")
    assert '[semantics]\nstatistics = "norm.statistics.safetensors"\ndictionary_norm = "l2"  #' in (
        path.read_text()
    )


def test_nothing_is_missing(root: Path) -> None:
    with pytest.raises(UsageError, match="nothing is missing: 'small/a' can be read"):
        found(root, "a")
    entry(root, "twice", threshold="1", k="4")
    found(root, "twice")
    with pytest.raises(UsageError, match="nothing is missing"):
        found(root, "twice")


def test_what_was_found_earlier_stays(root: Path, tmp_path: Path) -> None:
    """Of the same file, in place and in a copy; each fact with what it came from."""
    semantics = "\n[semantics]\nthreshold = 0.5\n"
    path = entry(root, "again", semantics, scaling="zscore", threshold="1", k="5")
    first = found(root, "again")
    before, file = read_statistics(first.statistics), first.statistics.read_bytes()
    path.write_text(path.read_text().replace("threshold = 0.5\n", ""))
    done = found(root, "again", out=str(tmp_path))
    assert first.statistics.read_bytes() == file
    for one in (done, found(root, "again")):
        after = read_statistics(one.statistics)
        assert set(one.facts) == {"threshold"}
        assert set(after) == {"input_mean", "input_std", "threshold"}
        assert all(torch.equal(after[name], before[name]) for name in before)
        origins = origins_of(one.statistics)
        assert origins["input_mean"] == origins["input_std"] == first.origin
        assert origins["threshold"] == one.origin != first.origin
    sae = saebench.load_sae("small/again", registry=root)
    assert sae.record.estimated == ("input_mean", "input_std", "threshold")


def test_what_is_asked_in_vain(root: Path) -> None:
    entry(root, "vain", scaling="zscore")
    with pytest.raises(UsageError, match="--k 9 is of a threshold, and what is missing is input"):
        found(root, "vain", k=9)
    for images in (0, -1):
        with pytest.raises(UsageError, match=f"--images {images}: there is nothing"):
            estimate(Registry.load([root]), "small/vain", images=images)


def test_a_place_that_cannot_be_written_is_seen_before_any_pass(root: Path, tmp_path: Path) -> None:
    entry(root, "place", threshold="1", k="4")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/x", "/proc/x"):
        with pytest.raises(WriteError, match="cannot be written"):
            found(root, "place", out=str(out), on_images=lambda n: pytest.fail("a pass was made"))
    with pytest.raises(KeyboardInterrupt):
        found(root, "place", out=str(tmp_path / "new"), on_images=_stopped)
    assert not (tmp_path / "new").exists()


def _stopped(n: int) -> NoReturn:
    raise KeyboardInterrupt


def test_a_copy_of_a_built_in_entry(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = entry(root, "built-in", threshold="1", k="4")
    before, registry = path.read_text(), Registry.load([root])
    out = str(tmp_path / "mine")
    with monkeypatch.context() as patched:
        patched.setattr("saebench.paths.CONTENT", root)
        with pytest.raises(UsageError, match=r"(?s)is built in.*--out FOLDER"):
            estimate(registry, "small/built-in", images=N)
        done = estimate(registry, "small/built-in", images=N, out=out, device="cpu")
    assert path.read_text() == before
    assert done.entry == tmp_path / "mine/registry/saes/small/built-in.toml"
    assert not path.with_name("built-in.statistics.safetensors").exists()
    registry = Registry.load([tmp_path / "mine", root])
    spec = registry.sae("small/built-in")
    assert spec.replaces == str(root)
    assert spec.path == str(done.entry)
    assert saebench.load_sae("small/built-in", registry=registry).record.estimated
    with pytest.raises(UsageError, match="is there already"):
        found(root, "built-in", out=out)


def test_an_interrupt_leaves_the_entry_as_it_was(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = entry(root, "stopped", threshold="1", k="7")
    before = path.read_text()

    with pytest.raises(KeyboardInterrupt):
        found(root, "stopped", on_images=_stopped)
    monkeypatch.setattr("saebench.estimate.write_statistics", lambda *_: _stopped(0))
    with pytest.raises(KeyboardInterrupt):
        found(root, "stopped")
    assert path.read_text() == before
    assert not path.with_name("stopped.statistics.safetensors").exists()


def test_another_width_is_seen_before_any_pass(root: Path) -> None:
    folder = root / "registry/saes/small"
    asking_format.write(folder / "sae.safetensors", numbers(8, 16, seed=2), rows(), threshold="1")
    (folder / "narrow.toml").write_text(sae_entry())
    with pytest.raises(Mismatch, match="reads 8 dimensions"):
        found(root, "narrow", k=3, on_images=lambda n: pytest.fail("a pass was made"))


def test_an_sae_on_an_sae(root: Path) -> None:
    path = entry(root, "above", threshold="1", k="4")
    path.write_text(path.read_text().replace('"blocks.1"', '"sae:small/a/codes"'))
    with pytest.raises(UsageError, match="reads another SAE"):
        found(root, "above")


def test_the_command_and_the_rows(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str | Path) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(map(str, arguments)))
        assert isinstance(ended.value.code, int)
        return ended.value.code

    entry(root, "rows", scaling="zscore", threshold="1", k="5")
    command = ("estimate", "small/rows", "--registry", root, "--device", "cpu")
    assert run(*command, "--images", "64") == 0
    said = capsys.readouterr().out
    assert "from the first 64 images of shapes/train through small, blocks.1 (all)" in said
    assert f"next: saebench check sae small/rows --registry {root}" in said
    rows_of = saebench.run(
        backbone="small",
        sae=["small/rows", "small/a", "small/rows@shuffled-decoder", "identity"],
        task="sparsity",
        limit=32,
        train_limit=32,
        registry=root,
        device="cpu",
        out=tmp_path,
    )
    columns = rows_of[["sae", "sae_format", "sae_estimated"]].drop_duplicates().set_index("sae")
    assert columns.loc["small/rows"].tolist() == ["asking", "input_mean,input_std,threshold"]
    assert columns.loc["small/a", "sae_format"] == "saebench"
    rest = ["small/rows@shuffled-decoder", "identity"]
    assert pd.isna(columns.loc[["small/a", *rest], "sae_estimated"]).all()
    assert pd.isna(columns.loc[rest, "sae_format"]).all()


# The entry's text


TEXT = """\
# What I know.
backbone = "b"   # yes

[weights]  # where
file = "w"

[semantics]
k = 3   # of the paper

[other]
"""


def test_a_key_is_added_and_all_else_stays() -> None:
    text = with_key(TEXT, "semantics", "statistics", "s", where="f")
    assert text == TEXT.replace("[semantics]\n", '[semantics]\nstatistics = "s"\n')
    text = with_key(TEXT, "", "replaces", "built-in", where="f")
    assert text == TEXT.replace("backbone", 'replaces = "built-in"\nbackbone', 1)
    text = with_key(TEXT, "weights", "file", "../w", where="f")
    assert text == TEXT.replace('file = "w"', 'file = "../w"')
    assert with_key("a = 1", "semantics", "b", "c", where="f") == 'a = 1\n\n[semantics]\nb = "c"\n'


@pytest.mark.parametrize(
    "text",
    [
        'semantics = { k = 3 }\n[weights]\nfile = "w"\n',
        "semantics = 3\n",
        'semantics.k = 3\n[weights]\nfile = "w"\n',
    ],
)
def test_a_text_that_would_have_to_change_more(text: str) -> None:
    with pytest.raises(SpecError, match=r"write it yourself:   \[semantics\]  statistics = \"s\""):
        with_key(text, "semantics", "statistics", "s", where="f")


def test_a_table_in_a_string_is_none() -> None:
    text = 'description = """\n[semantics]\n"""\n[semantics]\nk = 3\n'
    with pytest.raises(SpecError, match="write it yourself"):
        with_key(text, "semantics", "statistics", "s", where="f")
