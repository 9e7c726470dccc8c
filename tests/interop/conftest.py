"""Peers' packages are imported only where their tests are asked for.

A test is deselected after its file was imported, and what some of these packages import (nnsight)
replaces torch's FakeTensor for the rest of the process.
"""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    asked: str = config.getoption("markexpr")
    return None if "interop" in asked and not asked.startswith("not") else True
