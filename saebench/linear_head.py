"""Linear heads for backbones that have none of their own: published ones, and probes.

A probe (`saebench.probe`) is fitted on what the head reads of untouched train images, the first
`n_probe` of the fixed order, and their main label; λ is chosen by every fifth of them. The rows are
few, so they are fitted in float64 to a hundredth of the usual tolerance: losses are read beside
each other through it. It is an artifact of the store, shared by all runs; beside W and b it has its
λ, its losses in nat and accuracies on the train rows and on those that λ was chosen by, and whether
it converged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from saebench.backbones import Backbone
from saebench.data import Dataset
from saebench.errors import SaebenchError
from saebench.fit import Fitter
from saebench.heads import PROBE, HeadInUse, published_head
from saebench.probe import DenseRows, Probe, fit_probe
from saebench.probing.sample import EVERY
from saebench.probing.stored import arrays_of, on_device
from saebench.published_head import read_published
from saebench.readouts import LinearHead
from saebench.units import Source

TOLERANCE = 1e-6  # of the loss, that may be left to gain


def linear_readout(
    backbone: Backbone, dataset: Dataset, source: Source, fitter: Fitter, used: HeadInUse
) -> LinearHead:
    """The linear head of a backbone for a dataset's classes. used: `published` or `probe`.

    A probe that did not converge, or saw nothing of some classes, is used, with a warning.
    Errors: those of `read_published` and of `Fitter.fit`.
    """
    if used == "published":
        file = published_head(backbone.spec, dataset.spec)
        assert file is not None
        return _head(backbone, used, *read_published(backbone, dataset, file))
    (artifact,) = fitter.fit([probe_of(backbone, dataset)])
    arrays = artifact.arrays
    for said in _cautions(arrays, backbone.spec.name, source):
        warnings.warn(said, stacklevel=2)
    W_dc, b_c = torch.from_numpy(arrays["W_dc"]), torch.from_numpy(arrays["b_c"])
    note = f"a probe of {source.n_probe} train images, λ = {float(arrays['penalty']):.2g}"
    return _head(backbone, used, W_dc, b_c, note)


def probe_of(backbone: Backbone, dataset: Dataset) -> Callable[[], ProbeFit]:
    """What begins the fit of a backbone's probe."""
    return partial(ProbeFit, backbone, len(dataset.class_names))


class ProbeFit:
    """The probe of a backbone on its clean features (`saebench.fit.OutputFit`)."""

    kind, site, n_images = "linear_head", None, None

    def __init__(self, backbone: Backbone, n_classes: int) -> None:
        self.device, self.n_classes = backbone.device, n_classes
        self.key = {
            "probe": PROBE,
            "features": list(backbone.spec.head.features),
            "classes": n_classes,
            **({"last_block": backbone.last_block} if backbone.last_block != "full" else {}),
        }
        self.read: list[Tensor] = []
        self.labels: list[np.ndarray] = []

    def update(self, read_bd: Tensor, labels_b: np.ndarray) -> None:
        self.read.append(read_bd.cpu())
        self.labels.append(labels_b)

    def arrays(self) -> dict[str, np.ndarray]:
        read_nd = torch.cat(self.read)
        labels_n = torch.from_numpy(np.concatenate(self.labels)).long()
        return arrays_of(
            on_device(self.device, lambda device: self._fitted(read_nd, labels_n, device))
        )

    def _fitted(self, read_nd: Tensor, labels_n: Tensor, device: torch.device) -> Probe:
        rows = DenseRows.of(read_nd.to(device), labels_n.to(device), torch.float64)
        held_n = torch.arange(rows.n, device=device) % EVERY == EVERY - 1
        return fit_probe(rows, held_n, self.n_classes, tolerance=TOLERANCE)


def _head(
    backbone: Backbone, used: HeadInUse, W_dc: Tensor, b_c: Tensor, note: str = ""
) -> LinearHead:
    own = W_dc.to(backbone.device), b_c.to(backbone.device)
    return LinearHead(*own, used, backbone.spec.head.features, note)


def _cautions(arrays: Mapping[str, np.ndarray], name: str, source: Source) -> list[str]:
    """What there is to say against a fitted probe."""
    who = f"the probe of '{name}' on '{source.spec.name}'"
    hint = f"it was fitted on {source.n_probe} train images: give more by  --train-limit"
    found = []
    if not arrays["converged"]:
        found.append(
            str(
                SaebenchError(
                    f"{who} did not converge: its loss may be a millionth and more above the least",
                    f"its penalty is {float(arrays['penalty']):.1e}, and its train loss "
                    f"{float(arrays['loss_train']):.4f} nat",
                )
            )
        )
    if absent := int(arrays["absent"]):
        n_classes = len(arrays["b_c"])
        found.append(
            str(SaebenchError(f"{who} saw no image of {absent} of its {n_classes} classes", hint))
        )
    if np.isnan(arrays["loss_validation"]):
        found.append(
            str(SaebenchError(f"{who}: too few images to choose its penalty by: the largest", hint))
        )
    return found
