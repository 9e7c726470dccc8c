"""What can rot in the documentation is held to the code."""

from __future__ import annotations

import re
import tomllib

import pytest

from saebench import paths
from saebench.registry import Registry
from saebench.taskfiles import metrics_table

DOCS = sorted([*(paths.CONTENT / "docs").glob("*.md"), *paths.CONTENT.glob("*.md")])


def test_the_table_of_metrics_is_the_tasks_own() -> None:
    text = (paths.CONTENT / "docs/metrics.md").read_text()
    assert text.endswith(metrics_table(Registry.load())), "make it anew: saebench.taskfiles"


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path}: {target}"


def test_the_task_of_the_page_is_one(tmp_path) -> None:
    from saebench.taskfiles import load_task

    text = (paths.CONTENT / "docs/add_a_task.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mean_norm.py").write_text(code)
    assert load_task(Registry.load([tmp_path]), "mean_norm").name == "mean_norm"


def test_every_toml_of_a_page_parses() -> None:
    for path in DOCS:
        for block in re.findall(r"```toml\n(.*?)```", path.read_text(), re.DOTALL):
            tomllib.loads(block)
