"""Who imports whom, and what must not be imported to list or plan."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saebench
from saebench import paths

PACKAGE = Path(saebench.__file__).parent
HEAVY = {"torch", "torchvision", "pandas", "pyarrow", "timm", "open_clip", "datasets", "sklearn"}
LIGHT = [
    "cli",
    "runconfig",
    "specs",
    "strict",
    "registry",
    "task",
    "taskfiles",
    "plan",
    "units",
    "waves",
    "probe_features",
    "probe_options",
    "weights",
    "hub",
    "lock",
    "coders",
    "errors",
    "paths",
    "weights",
    "modelfiles",
    "whereabouts",
    "lock",
    "hub",
    "hub_errors",
    "fetch",
    "beside",
    "address",
    "showing",
    "tomledit",
]


def module_level_imports(path: Path) -> set[str]:
    """Top-level imports, those for the type checker alone left out."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("module", LIGHT)
def test_listing_and_planning_import_nothing_heavy(module: str) -> None:
    imports = module_level_imports(PACKAGE / f"{module}.py")
    assert not {name.partition(".")[0] for name in imports} & HEAVY


def test_no_module_that_cli_pulls_in_is_heavy() -> None:
    code = (
        "import sys, saebench.cli, saebench.plan; "
        f"print(sorted({sorted(HEAVY)!r} & sys.modules.keys()))"
    ).replace(f"{sorted(HEAVY)!r} &", f"set({sorted(HEAVY)!r}) &")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "path", sorted((paths.CONTENT / "tasks").glob("*.py")), ids=lambda p: p.stem
)
def test_a_task_file_imports_the_standard_library_and_the_protocol_alone(path: Path) -> None:
    for name in module_level_imports(path):
        assert name == "saebench.task" or name.partition(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("path", sorted((PACKAGE / "metrics").glob("*.py")), ids=lambda p: p.stem)
def test_metrics_know_nothing_of_saebench(path: Path) -> None:
    for name in module_level_imports(path):
        assert not name.startswith("saebench") or name.startswith("saebench.metrics")


@pytest.mark.parametrize("path", sorted((PACKAGE / "probe").glob("*.py")), ids=lambda p: p.stem)
def test_solvers_know_nothing_of_saebench(path: Path) -> None:
    for name in module_level_imports(path):
        assert not name.startswith("saebench") or name.startswith("saebench.probe.")


def test_only_check_imports_testing() -> None:
    for path in PACKAGE.rglob("*.py"):
        if "testing" not in path.parts:
            imports = module_level_imports(path)
            assert not any(name.startswith("saebench.testing") for name in imports), path


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").glob("*.py")), ids=lambda p: p.stem)
def test_data_know_nothing_of_backbones_and_runs(path: Path) -> None:
    engine = ("batch", "runner", "plan", "units", "fit", "evaluation", "backbones", "saes", "api")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.module.removeprefix("saebench.").partition(".")[0] not in engine
