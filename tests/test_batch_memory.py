"""A batch of images is freed as soon as it is done with, not when the garbage collector comes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import saebench
from saebench.evaluation import Evaluation
from saebench.images import Images
from tests.small import setting


def test_at_most_two_batches_are_there_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is measured, and the one that the pass has just made."""
    made: list[weakref.ref[Images]] = []
    alive: list[int] = []
    plain = Evaluation.batches

    def watched(self: Evaluation, *how: Any) -> Iterator[Images]:
        for images in plain(self, *how):
            made.append(weakref.ref(images))
            alive.append(sum(one() is not None for one in made))
            yield images

    monkeypatch.setattr(Evaluation, "batches", watched)
    gc.collect()
    gc.disable()
    try:
        saebench.run(
            backbone="small",
            sae=["small/a", "small/meta", "identity"],
            task=["reconstruction", "loss_substitution"],
            registry=[setting(tmp_path / "content")],
            limit=64,
            train_limit=64,
            batch_size=8,
            out=tmp_path / "results",
        )
    finally:
        gc.enable()
    assert len(made) == 8
    assert max(alive) <= 2
