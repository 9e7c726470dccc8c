"""A fitted probe as the arrays of an artifact, and as a task finds it; where it is fitted.

W_dc [d c], b_c [c]  float64, for features as they are
latents_k [k] int64  which columns of codes, where not all
ranked_by [2] int64    on how many of the first images these were ranked, and of how many
the numbers of the fit, 0-d each: penalty, losses in nat, accuracies, converged, absent, …
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from saebench.errors import is_out_of_memory
from saebench.probe import Probe
from saebench.probing.probes import Fitted

T = TypeVar("T")


def on_device(device: torch.device, fit: Callable[[torch.device], T]) -> T:
    """A fit on a backbone's device, if that is a GPU with room for it, else on the CPU."""
    if device.type == "cuda":  # other accelerators have no float64
        try:
            return fit(device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # it holds the frames that hold the memory
        torch.cuda.empty_cache()
    return fit(torch.device("cpu"))


def arrays_of(probe: Probe, latents_k: Tensor | None = None) -> dict[str, np.ndarray]:
    """Everything of a probe, to be stored."""
    arrays = {
        name: value.cpu().numpy() if isinstance(value, Tensor) else np.array(value)
        for name, value in vars(probe).items()
    }
    return arrays if latents_k is None else {**arrays, "latents_k": latents_k.cpu().numpy()}


def fitted_of(
    arrays: Mapping[str, np.ndarray],
    *,
    solver: str,
    n_train: int,
    device: torch.device,
    variant: Mapping[str, Any] | None = None,
    large: bool = False,
) -> Fitted:
    """The classifier of such arrays, on a device. n_train: images that the last fit saw.

    large: W_dc stays where it is, in its file most often, on a GPU that has no room to spare.
    """
    latents = arrays.get("latents_k")
    W_dc = torch.from_numpy(arrays["W_dc"])
    return Fitted(
        W_dc if large and not _has_room(device, W_dc.nbytes) else W_dc.to(device),
        torch.from_numpy(arrays["b_c"]).to(device),
        None if latents is None else torch.from_numpy(latents).to(device),
        {
            "solver": solver,
            "penalty": float(arrays["penalty"]),
            "converged": bool(arrays["converged"]),
            "n_train": n_train,
        },
        variant or {},
        "; ".join(cautions(arrays)),
    )


def _has_room(device: torch.device, n_bytes: int) -> bool:
    """Whether half of a GPU's memory is still free after so many bytes."""
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    return free - n_bytes > total // 2


def cautions(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """What there is to say against a fitted probe."""
    found = []
    if not arrays["converged"]:
        found.append(f"its fit did not converge: up to {float(arrays['left']):.1g} nat are left")
    first, n = arrays.get("ranked_by", np.zeros(2, np.int64)).tolist()
    if first < n:
        found.append(f"latents ranked on the first {first:,} train images")
    if absent := int(arrays["absent"]):
        found.append(f"{absent} of {len(arrays['b_c'])} classes have no train image")
    if np.isnan(arrays["accuracy_validation"]):
        found.append("too few train images to choose its penalty by: the largest")
    return found
