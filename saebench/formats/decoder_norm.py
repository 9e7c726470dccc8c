"""Whether the rows of an SAE's decoder have length 1: measured, whatever its format promises."""

from __future__ import annotations

import torch

from saebench.formats.facts import Facts
from saebench.saes import Sae

DECODER_NORM = "decoder_norm"
_TOLERANCE = 1e-3


def say_decoder_norm(sae: Sae, facts: Facts) -> None:
    """The fact decoder_norm, "unit" or "free". Errors: SpecError where it is given otherwise."""
    low, high = (float(length) for length in sae.W_dec_sd.norm(dim=1).aminmax())
    # A row was of length 1 before it was rounded to what the file stores.
    slack = max(_TOLERANCE, torch.finfo(getattr(torch, sae.stored_dtype)).eps)
    unit = max(1 - low, high - 1) <= slack
    lengths = f"its rows are of length {low:.4g} to {high:.4g}"
    facts.measured(DECODER_NORM, "unit" if unit else "free", lengths)
