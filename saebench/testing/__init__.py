"""Conformance: what a new SAE, backbone or task must do before its numbers can be trusted.

`saebench check sae|backbone|task NAME` prints the report; in Python, `check_sae(registry, name)`
and its siblings yield `Check`s. Nothing is measured for a leaderboard here: the activations are
those of a few real images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.data.access import Access
from saebench.registry import Registry
from saebench.testing.backbone import check_backbone
from saebench.testing.report import Check
from saebench.testing.sae import check_sae
from saebench.testing.task import check_task

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Check", "check_backbone", "check_sae", "check_task", "print_check"]


def print_check(
    registry: Registry, kind: str, name: str, console: Console, access: Access | None = None
) -> int:
    """Print a report and return the exit status: 0 only when everything passed.

    `access` says where datasets lie; none is downloaded.
    """
    checks = {"sae": check_sae, "backbone": check_backbone, "task": check_task}[kind]
    n_failed = 0
    for check in checks(registry, name, access=access):
        console.print("[green]ok  [/] " if check.passed else "[red]FAIL[/] ", end="")
        detail = check.detail.replace("\n", "\n     ")
        console.print(f"{check.name}: {detail}", markup=False, soft_wrap=True)
        n_failed += not check.passed
    if n_failed:
        console.print(f"{n_failed} checks of {name} failed", style="red")
    return 1 if n_failed else 0
