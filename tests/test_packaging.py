"""A wheel, an editable install and a bare checkout find the same content by the same code."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from saebench import paths

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "-w", str(folder), str(REPOSITORY)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.startswith("saebench_vision-")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def listed(site: Path, elsewhere: Path, *arguments: str) -> str:
    """What a pipe gets: whole lines, where no $COLUMNS says how wide it is."""
    wide = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    done = subprocess.run(
        [sys.executable, "-m", "saebench", "ls", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=elsewhere,
        env={**wide, "PYTHONPATH": str(site)},
    )
    return done.stdout


@pytest.mark.parametrize("kind", ["backbones", "datasets", "tasks", "saes", "leaderboards"])
def test_the_wheel_lists_what_the_checkout_lists(
    installed: Path, tmp_path: Path, kind: str
) -> None:
    from_wheel = listed(installed, tmp_path, kind)
    assert from_wheel == listed(REPOSITORY, tmp_path, kind)
    assert "built-in" in from_wheel


def test_the_wheel_carries_every_content_file_and_nothing_else(installed: Path) -> None:
    git = ["git", "-C", str(REPOSITORY), "ls-files", "registry", "tasks", "leaderboards"]
    tracked = subprocess.run(git, capture_output=True, text=True)
    if tracked.returncode or not tracked.stdout:
        pytest.skip("not a git checkout")
    carried = {
        path.relative_to(installed / "saebench/_content").as_posix()
        for path in (installed / "saebench/_content").rglob("*")
        if path.is_file()
    }
    assert set(tracked.stdout.splitlines()) <= carried


def test_a_checkout_reads_its_own_root() -> None:
    assert paths.CONTENT == REPOSITORY
