"""Fixtures for all tests: no test touches the user's own store or configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests run in two processes (pytest-xdist): each computes with one thread, before torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One store for the whole session: train statistics are fitted once, as for a user."""
    root = tmp_path_factory.mktemp("saebench")
    old = {name: os.environ.get(name) for name in ("SAEBENCH_STORE", "SAEBENCH_CONFIG")}
    os.environ["SAEBENCH_STORE"] = str(root / "store")
    os.environ["SAEBENCH_CONFIG"] = str(root / "config")
    os.environ.pop("SAEBENCH_PATH", None)
    yield
    for name, value in old.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def real_data() -> Path:
    """Real photographs and classifiers outside the repository: `SAEBENCH_REAL_DATA`."""
    root = os.environ.get("SAEBENCH_REAL_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("SAEBENCH_REAL_DATA names no folder")
    return Path(root)
