"""Where the built-in content lies, and where saebench may write outside a results folder.

A checkout and an editable install read `registry/ tasks/ leaderboards/` beside the package; a wheel
carries them inside it as `_content/`. One constant decides, and everything else goes through it.
Nothing is ever written below `CONTENT`.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CARRIED = _PACKAGE / "_content"

CONTENT: Path = _CARRIED if _CARRIED.is_dir() else _PACKAGE.parent
"""The folder that holds the built-in `registry/`, `tasks/` and `leaderboards/`."""


def user_config() -> Path:
    """The user's content folder and `config.toml`: `SAEBENCH_CONFIG` or the platform's place."""
    if path := os.environ.get("SAEBENCH_CONFIG"):
        return Path(path)
    import platformdirs

    return Path(platformdirs.user_config_dir("saebench", appauthor=False))


def user_weights() -> Path:
    """Where weights that no hub has are put by hand: `SAEBENCH_WEIGHTS` or the platform's place."""
    if path := os.environ.get("SAEBENCH_WEIGHTS"):
        return Path(path)
    import platformdirs

    return Path(platformdirs.user_data_dir("saebench", appauthor=False)) / "weights"


def user_store() -> Path:
    """Where artifacts are kept between runs: `SAEBENCH_STORE` or the platform's cache folder."""
    if path := os.environ.get("SAEBENCH_STORE"):
        return Path(path)
    import platformdirs

    return Path(platformdirs.user_cache_dir("saebench", appauthor=False)) / "store"
