"""The command line as a user meets it, in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from saebench import cli
from saebench.cli import parse
from saebench.errors import UsageError
from saebench.runconfig import RunConfig
from tests.small import setting

# The command line with segments of 64 images, so that a short run has several.
SHORT_SEGMENTS = (
    "import saebench.units, saebench.evaluation; from saebench.cli import main; "
    "saebench.units.SEGMENT = saebench.evaluation.SEGMENT = 64; main()"
)


def environment() -> dict[str, str]:
    """As it is now: a fixture points saebench's own folders into the test's."""
    return {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}


def saebench(*arguments: str | Path, code: str = "") -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "saebench"]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )


def begin(*arguments: str | Path, code: str = "") -> subprocess.Popen[str]:
    start = ["-c", code] if code else ["-m", "saebench"]
    return subprocess.Popen(
        [sys.executable, *start, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return setting(tmp_path_factory.mktemp("content"))


def quick(root: Path, out: Path, *more: str) -> list[str]:
    small = ["run", "--registry", str(root), "--backbone", "small", "--out", str(out)]
    return [*small, "--task", "reconstruction", "sparsity", "--train-limit", "64", *more]


def test_a_command_line_is_a_run_config() -> None:
    parsed = parse(["run", "--backbone", "a", "b*", "--sae", "x", "--limit", "3", "--dry-run"])
    assert parsed == RunConfig(backbone=("a", "b*"), sae=("x",), limit=3, dry_run=True)
    assert parse(["run"]) == RunConfig()


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["run", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for option in RunConfig.__dataclass_fields__:
        assert f"--{option.replace('_', '-')}" in said


@pytest.mark.parametrize(
    "arguments",
    [["run", "--backbon", "x"], ["nonsense"], ["run", "--limit", "many"], ["ls", "things"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2


def test_an_option_given_twice_is_refused_rather_than_half_heard() -> None:
    with pytest.raises(UsageError, match="--sae is given twice") as error:
        parse(["run", "--sae", "a", "--backbone", "b", "--sae=c"])
    assert "--sae A B" in error.value.hint
    assert parse(["run", "--sae", "a", "c"]) == RunConfig(sae=("a", "c"))


def test_a_warning_of_ours_is_a_sentence() -> None:
    ours = cli._plain_warning("mind the gap", UserWarning, cli.__file__, 7)
    assert ours == "warning: mind the gap\n"
    other = cli._plain_warning("mind the gap", UserWarning, pd.__file__, 7)
    assert other == f"{pd.__file__}:7: UserWarning: mind the gap\n"


def test_run_prints_a_table_and_the_line_that_reads_it(root: Path, tmp_path: Path) -> None:
    done = saebench(*quick(root, tmp_path / "r", "--limit", "64"))
    assert done.returncode == 0, done.stderr
    for said in ("fvu ↓", "l0", "identity", "pca-8", "controls", "±"):
        assert said in done.stdout
    line = done.stdout.strip().splitlines()[-1].strip()
    rows = eval(line, {"pd": pd})
    assert {"small/a", "identity", "small/meta"} <= set(rows["sae"])


def test_the_table_fits_in_80_columns(root: Path, tmp_path: Path) -> None:
    from io import StringIO

    from rich.console import Console

    from saebench.report import print_tables

    done = saebench(*quick(root, tmp_path / "r", "--limit", "64"))
    assert done.returncode == 0, done.stderr
    text = StringIO()
    rows = pd.read_parquet(tmp_path / "r")
    columns = ["sparsity/l0", "reconstruction/fvu", "reconstruction/cosine"]
    print_tables(rows, columns, Console(file=text, width=80))
    assert max(map(len, text.getvalue().splitlines())) <= 80
    assert "…" not in text.getvalue()


def test_unknown_names_exit_with_2_and_say_the_nearest(root: Path, tmp_path: Path) -> None:
    done = saebench(*quick(root, tmp_path / "r"), "--sae", "small/aa")
    assert done.returncode == 2
    assert "did you mean small/a" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r" / "results.parquet").exists()


def test_a_failed_unit_exits_with_1_and_status_says_why(tmp_path: Path) -> None:
    root = setting(tmp_path / "content")
    (root / "registry/saes/small/a.safetensors").write_bytes(b"version https://git-lfs.github.com")
    done = saebench(*quick(root, tmp_path / "r", "--limit", "64", "--sae", "small/a", "small/b"))
    assert done.returncode == 1
    assert "LFS" in done.stderr
    assert "small" in done.stdout  # the table of what was measured
    options = quick(root, tmp_path / "r", "--limit", "64", "--sae", "small/a", "small/b")[1:]
    status = saebench("status", *options)
    assert status.returncode == 1
    assert "2 done, 2 failed" in status.stdout
    assert "LFS" in status.stdout


def test_status_says_what_is_missing_and_why_a_unit_is_another(root: Path, tmp_path: Path) -> None:
    few = quick(root, tmp_path / "r", "--limit", "64", "--sae", "small/a")
    assert saebench(*few).returncode == 0
    more = quick(root, tmp_path / "r", "--limit", "64", "--sae", "small/a", "small/b")[1:]
    status = saebench("status", *more)
    assert "2 done, 0 failed, 0 begun, 2 missing of 4 units" in status.stdout
    unit = pd.read_parquet(tmp_path / "r")["unit_id"].iloc[0]
    longer = quick(root, tmp_path / "r", "--limit", "80", "--sae", "small/a")[1:]
    why = saebench("status", *longer, "--why", unit[:10])
    assert "dataset.n_images: stored 64, this run 80" in why.stdout
    assert saebench("status", *more, "--why", "zzz").returncode == 2


def test_status_of_no_folder(tmp_path: Path) -> None:
    done = saebench("status", "--out", tmp_path / "absent")
    assert done.returncode == 2
    assert "there is no results folder" in done.stderr


def test_ls_and_show(root: Path) -> None:
    listed = saebench("ls", "saes", "small/*", "--registry", root)
    assert listed.returncode == 0
    assert "small/relu" in listed.stdout
    shown = saebench("show", "small/a", "--registry", root)
    assert "sha256" in shown.stdout
    task = saebench("show", "rows", "--registry", root)
    assert "Counts the rows." in task.stdout


def test_ls_names_a_broken_entry_and_lists_the_others(tmp_path: Path) -> None:
    root = setting(tmp_path / "content")
    (root / "registry/saes/small/bad.toml").write_text("backbon = 1")
    listed = saebench("ls", "saes", "small/*", "--registry", root)
    assert listed.returncode == 1
    assert "small/relu" in listed.stdout
    assert "did you mean 'backbone'" in listed.stdout


def test_a_dry_run_says_what_would_be_done(root: Path, tmp_path: Path) -> None:
    done = saebench(*quick(root, tmp_path / "r", "--limit", "64", "--dry-run"))
    assert done.returncode == 0
    assert "units to measure" in done.stdout
    assert not (tmp_path / "r").exists()


def long_run(root: Path, out: Path) -> list[str]:
    return quick(root, out, "--sae", "small/a", "small/b", "--limit", "640", "--batch-size", "4")


def measured(out: Path) -> pd.DataFrame:
    key = ["unit_id", "group", "metric", "variant"]
    rows = pd.read_parquet(out / "results.parquet")
    return rows[[*key, "value", "ci_low", "ci_high", "n"]].sort_values(key).reset_index(drop=True)


@pytest.fixture(scope="module")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("whole") / "r"
    assert saebench(*long_run(root, out), code=SHORT_SEGMENTS).returncode == 0
    return measured(out)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_after_a_kill_the_same_command_ends_as_if_nothing_had_happened(
    root: Path, tmp_path: Path, undisturbed: pd.DataFrame, how: signal.Signals
) -> None:
    process = begin(*long_run(root, tmp_path / "r"), code=SHORT_SEGMENTS)
    until = time.monotonic() + 100
    while len(list((tmp_path / "r/_partial").rglob("*.state"))) < 8:  # two segments of four units
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on from there" in said
        assert "Traceback" not in said
    else:
        assert process.returncode == -signal.SIGKILL
    assert list((tmp_path / "r/_partial").rglob("*.state"))
    done = saebench(*long_run(root, tmp_path / "r"), code=SHORT_SEGMENTS)
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(measured(tmp_path / "r"), undisturbed, check_exact=True)


@pytest.mark.slow
def test_two_runs_at_once_into_one_folder(root: Path, tmp_path: Path) -> None:
    limit = ("--limit", "200")
    both = [
        begin(*quick(root, tmp_path / "r", "--sae", sae, "zero", *limit))
        for sae in ("small/a", "small/b")
    ]
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    rows = pd.read_parquet(tmp_path / "r" / "results.parquet")
    assert {"small/a", "small/b", "zero"} == set(rows["sae"])
    assert not rows.duplicated(["unit_id", "split", "group", "metric", "variant"]).any()


def test_output_to_a_closed_pipe_is_no_error(root: Path) -> None:
    command = f"{sys.executable} -m saebench ls saes --registry {root} | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
