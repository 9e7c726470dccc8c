"""Choices that tasks leave to their user, `--option TASK.NAME=VALUE`: checked before a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from saebench.errors import UsageError
from saebench.task import Task

Chosen = Mapping[str, Mapping[str, str]]
"""Task name -> option -> value, for what was given."""


def read_options(given: Iterable[str], tasks: Sequence[type[Task]]) -> Chosen:
    """`TASK.NAME=VALUE` for the tasks of a run.

    Errors: UsageError for another form, for a task that is not run, an option that it lacks, or a
    value that is not one of its choices; each names what there is.
    """
    by_name = {task.name: task for task in tasks}
    chosen: dict[str, dict[str, str]] = {}
    for text in given:
        path, equals, value = text.partition("=")
        task_name, dot, name = path.partition(".")
        if not (equals and dot and task_name and name and value):
            raise UsageError(
                f"--option {text}: not of the form TASK.NAME=VALUE", _every_option(tasks)
            )
        if task_name not in by_name:
            near = get_close_matches(task_name, by_name, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else _every_option(tasks)
            raise UsageError(f"--option {text}: no task '{task_name}' is run", hint)
        options = by_name[task_name].options
        if name not in options:
            near = get_close_matches(name, options, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"its options: {', '.join(options)}"
            raise UsageError(
                f"--option {text}: the task '{task_name}' has no option '{name}'",
                hint if options else "it has no options",
            )
        choices = options[name].choices
        if choices and value not in choices:
            raise UsageError(
                f"--option {text}: '{value}' is none of its choices", f"{', '.join(choices)}"
            )
        before = chosen.setdefault(task_name, {}).setdefault(name, value)
        if before != value:
            raise UsageError(
                f"--option {text}: it was given as '{before}' too",
                "one run has one value; run it again for the other: its rows stand beside",
            )
    return chosen


def values_of(task: type[Task], chosen: Chosen, *, conventions: bool = False) -> dict[str, str]:
    """Every option of a task with its value, in the one way in which the task would say it."""
    defaults = {name: option.default for name, option in task.options.items()}
    return dict(task.canonical({**defaults, **chosen.get(task.name, {})}, conventions=conventions))


def not_default(task: type[Task], values: Mapping[str, str]) -> dict[str, str]:
    """The options of a task that are not at their default: part of a unit's identity."""
    return {name: v for name, v in values.items() if v != task.options[name].default}


def _every_option(tasks: Sequence[type[Task]]) -> str:
    every = [
        f"{task.name}.{name}={'|'.join(option.choices) or option.default or name.upper()}"
        for task in tasks
        for name, option in task.options.items()
    ]
    return "there are: " + "  ".join(every) if every else "none of the tasks has options"
