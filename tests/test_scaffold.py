from __future__ import annotations

from pathlib import Path

import pytest

from saebench.errors import UsageError
from saebench.registry import Registry
from saebench.scaffold import write_new
from saebench.testing import check_backbone, check_task


def new(out: Path, kind: str, name: str, **options: str) -> Path:
    return write_new(
        Registry.load([out] if out.is_dir() else []), kind, name, out=str(out), **options
    )


def test_a_new_task_passes_check(tmp_path: Path) -> None:
    new(tmp_path, "task", "mean_norm")
    checks = list(check_task(Registry.load([tmp_path]), "mean_norm"))
    assert len(checks) == 5
    assert all(check.passed for check in checks), checks


def test_a_new_backbone_passes_check(tmp_path: Path) -> None:
    new(tmp_path, "backbone", "mine")
    checks = list(check_backbone(Registry.load([tmp_path]), "mine"))
    assert {"site blocks.2: layout", "transforms real images"} <= {check.name for check in checks}
    assert all(check.passed for check in checks), checks


def test_a_new_dataset_can_be_opened(tmp_path: Path) -> None:
    from saebench.data import open_dataset

    new(tmp_path, "dataset", "mine")
    dataset = open_dataset(Registry.load([tmp_path]).dataset("mine"))
    assert len(dataset.manifest(dataset.spec.test)) == 512


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    new(tmp_path, "task", "mean_norm")
    with pytest.raises(UsageError, match="is there already"):
        new(tmp_path, "task", "mean_norm")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("task", "reconstruction"), ("backbone", "tiny-vit"), ("dataset", "shapes")],
)
def test_a_name_that_is_taken(tmp_path: Path, kind: str, name: str) -> None:
    with pytest.raises(UsageError, match=f"the name '{name}' is that of .*{name}"):
        new(tmp_path, kind, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "name"),
    [("task", "a-b"), ("task", "class"), ("task", "_x"), ("dataset", "../x"), ("backbone", "a b")],
)
def test_a_name_that_cannot_be_one(tmp_path: Path, kind: str, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be"):
        new(tmp_path, kind, name)


def test_check_sees_a_task_whose_state_does_not_merge(tmp_path: Path) -> None:
    path = new(tmp_path, "task", "mean_norm")
    path.write_text(
        path.read_text()
        .replace("self.parts = {", "self.seen = 0.0\n        self.parts = {")
        .replace("# batch.x_btd,", "self.seen += batch.n_rows\n        # batch.x_btd,")
        .replace("part.mean(), n=part.n", "part.mean() * self.seen, n=part.n")
    )
    failed = [c for c in check_task(Registry.load([tmp_path]), "mean_norm") if not c.passed]
    assert [c.name for c in failed] == ["its state can be saved and merged"]
