"""A checkpoint format for tests of what is asked: it says as little as its options leave it.

A file of safetensors whose header says `format = "asking"`, with W [d s], D [s d] and perhaps
`k`. It does not hold its threshold, nor how its input was scaled.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saebench import formats
from saebench.activations import Threshold
from saebench.formats.content import Content
from saebench.formats.facts import Estimate, Facts
from saebench.saes import Sae

NAME = "asking"


def recognise(content: Content) -> bool:
    return content.metadata.get("format") == NAME


def read(content: Content, facts: Facts) -> Sae:
    meta, tensors = content.metadata, content.tensors
    d, s = tensors["W"].shape
    facts.always("pre_bias", False)
    if "k" in meta:
        facts.known("k", int(meta["k"]))
    words = ("model", "hook", "tokens", "dataset")
    facts.trained_on(**{word: meta.get(word) for word in words})
    scaling_of: Estimate = meta.get("scaling", "")  # type: ignore[assignment]
    if scaling_of:
        scaling = facts.ask_scaling("its makers scaled x", d=d, estimate=scaling_of)
    else:
        scaling = facts.ask_scaling("its makers scaled x", d=d) if "scaled" in meta else None
    theta = (
        facts.ask_number("threshold", "not stored", estimate="threshold")
        if "threshold" in meta
        else 0.0
    )
    if "norm" in meta:
        facts.ask_choice("dictionary_norm", "how its rows were normalised", ("l2", "identity"))
    facts.settle()
    zeros = torch.zeros(s)
    more = {} if scaling is None else {"scaling": scaling}
    return Sae(
        tensors["W"],
        zeros,
        tensors["D"],
        torch.zeros(d),
        Threshold(theta, True),
        "batchtopk",
        **more,  # type: ignore[arg-type]
    )


def write(path: Path, W_ds: torch.Tensor, D_sd: torch.Tensor, **meta: str) -> Path:
    """A file; `scaling` an `Estimate`, `threshold`, `norm`, `scaled`: what it has to be told."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"W": W_ds.contiguous(), "D": D_sd.contiguous()}
    save_file(tensors, path, {"format": NAME, **meta})
    return path


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format is one of those that are read."""
    import sys

    monkeypatch.setitem(formats.FORMATS, NAME, sys.modules[__name__])  # type: ignore[arg-type]
