"""saebench: how good is this sparse autoencoder, and how does it compare, on which backbone?

    import saebench
    rows = saebench.run(backbone="tiny-vit", task=["reconstruction", "sparsity"])   # a DataFrame
    sae = saebench.load_sae("tiny-vit/topk-k8")     # or a file, a folder, hf-hub:owner/name

What the package offers is imported when it is asked for, so that `import saebench` is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from saebench.api import plan_run, run
    from saebench.load import load_sae
    from saebench.registry import Registry
    from saebench.runconfig import RunConfig

_WHERE = {
    "run": "saebench.api",
    "plan_run": "saebench.api",
    "load_sae": "saebench.load",
    "Registry": "saebench.registry",
    "RunConfig": "saebench.runconfig",
}

__all__ = ["Registry", "RunConfig", "load_sae", "plan_run", "run"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'saebench' has no attribute '{name}'")
