"""Reads task files: their description without running them, their class by running them once.

`describe` parses the source only, so `ls` and `show` never execute a file. `load_task` imports a
file by its path, once, and only from an origin that is trusted.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from saebench.errors import SpecError
from saebench.registry import Registry
from saebench.task import Need, Option, Task

# Options of a task with `probes` in its needs, and their usual defaults.
OF_PROBES = {"feature": "auto", "label": "", "shots": "full", "solver": "logistic"}


@dataclass(frozen=True)
class TaskDescription:
    """What a task file says of itself, read from its source."""

    name: str
    path: Path
    origin: str
    doc: str
    metrics: tuple[str, ...]
    options: Mapping[str, Option]

    @property
    def title(self) -> str:
        return self.doc.strip().splitlines()[0] if self.doc.strip() else ""


def describe(registry: Registry, name: str) -> TaskDescription:
    """Docstring, metric names and options of a task, without executing its file."""
    origin, path = registry.task_path(name)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        raise SpecError(f"{path} is not valid Python: {error}") from None
    metrics = tuple(
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Metric"
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    )
    doc = ast.get_docstring(tree) or ""
    return TaskDescription(name, path, origin.label, doc, metrics, _options(tree))


def _options(tree: ast.Module) -> dict[str, Option]:
    """The options of a task's class, as far as its source writes them out."""
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = {}
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    for key, call in (pair for node in dicts for pair in zip(node.keys, node.values, strict=True)):
        name = _literal(key, constants)
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and name):
            continue
        if call.func.id == "Option":
            named = {item.arg or "": _literal(item.value, constants) for item in call.keywords}
            with suppress(TypeError):  # importing the file will say what is wrong with it
                found[name] = Option(*(_literal(item, constants) for item in call.args), **named)
    return found


def _literal(node: ast.expr | None, constants: Mapping[str, ast.expr]) -> Any:
    """The value of strings and tuples of them, and of constants of the file; else ''."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in constants:
        others = {name: value for name, value in constants.items() if name != node.id}
        return _literal(constants[node.id], others)
    if isinstance(node, (ast.Tuple, ast.List)):
        found: list[Any] = []
        for item in node.elts:
            if isinstance(item, ast.Starred):
                found += _literal(item.value, constants)
            else:
                found.append(_literal(item, constants))
        return tuple(found)
    return ""


def load_task(registry: Registry, name: str) -> type[Task]:
    """The task class of a file. Errors: UsageError (not trusted), SpecError (not one Task)."""
    origin, path = registry.task_path(name)
    origin.require_trust(f"the task file {path}")
    module_name = _module_name(origin.label, path)
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise SpecError(
                f"the task file {path} does not import: {type(error).__name__}: {error}"
            ) from error
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module_name
    ]
    if len(classes) != 1:
        raise SpecError(
            f"{path} defines {len(classes)} task classes",
            "one file is one class derived from saebench.task.Task",
        )
    (task,) = classes
    if getattr(task, "name", None) != name:
        raise SpecError(
            f"{path}: the class {task.__name__} is called '{getattr(task, 'name', '')}'",
            f"a task's name is its file's: write  name = \"{name}\"",
        )
    _check(task, path)
    return task


def _check(task: type[Task], path: Path) -> None:
    """Errors: SpecError for options or needs of another form than `saebench.task.Task` has."""
    for option, value in task.options.items():
        if not isinstance(value, Option):
            raise SpecError(
                f"{path}: the option '{option}' is {value!r}, not a saebench.task.Option",
                f'write  options = {{"{option}": Option("{value}")}}',
            )
    for need in task.needs:
        if need not in get_args(Need):
            raise SpecError(
                f"{path}: there is nothing called '{need}' that a task can need",
                f"needs: {', '.join(get_args(Need))}",
            )
    lacking = [name for name in OF_PROBES if name not in task.options]
    if "probes" in task.needs and lacking:
        entries = "".join(f'"{name}": Option("{OF_PROBES[name]}"), ' for name in lacking)
        raise SpecError(
            f"{path}: a task that needs probes has no option {' and none '.join(lacking)}",
            f"add to its options:  {entries.removesuffix(', ')}",
        )


def source_sha256(task: type[Task]) -> str:
    """Hash of a task's file: a change under the same version is warned about."""
    path = sys.modules[task.__module__].__file__
    assert path is not None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _module_name(label: str, path: Path) -> str:
    if label == "built-in":
        return f"saebench_tasks.{path.stem}"
    return (
        f"saebench_tasks.{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    )


def metrics_table(registry: Registry) -> str:
    """Every metric of every built-in task as Markdown: docs/metrics.md holds it."""
    lines = ["| task | metric | unit | better | interval | |", "|---|---|---|---|---|---|"]
    for name in registry.match_tasks(()):
        if registry.task_path(name)[0].label != "built-in":
            continue
        for metric in load_task(registry, name).metrics:
            doc = metric.doc.replace("|", "\\|")
            cells = (name, metric.name, metric.unit, metric.better, metric.interval, doc)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
