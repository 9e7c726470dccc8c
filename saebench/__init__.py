"""saebench: how good is this sparse autoencoder, and how does it compare, on which backbone?

    import saebench
    rows = saebench.run(backbone="tiny-vit", task=["reconstruction", "sparsity"])   # a DataFrame

What the package offers is imported when it is asked for, so that `import saebench` is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from saebench.api import plan_run, run
    from saebench.registry import Registry
    from saebench.runconfig import RunConfig

_WHERE = {
    "run": "saebench.api",
    "plan_run": "saebench.api",
    "Registry": "saebench.registry",
    "RunConfig": "saebench.specs",
}

__all__ = ["Registry", "RunConfig", "plan_run", "run"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'saebench' has no attribute '{name}'")
