"""UniversalSAE: {epoch, model_state_dict, optimizer_state_dict, learning_rate}, a file a backbone.

    u   = (x − m) / (s + 1e-5)            m and s numbers that only its yaml has
    z   = the k largest of relu(pre(u))   pre: saebench.formats.overcomplete_parts
    x̂   = (z @ D)·(s + 1e-5) + m          the rows of D normalised at every use, not in the file

An overcomplete of before multipliers wrote it, whose max_l2 and max_l1 are l2 and l1.
"""

from __future__ import annotations

from saebench.activations import TopK
from saebench.formats import overcomplete_dictionary as dictionary
from saebench.formats import overcomplete_parts
from saebench.formats.content import Content, refuse_unknown
from saebench.formats.facts import Facts
from saebench.saes import Sae

NAME = "universal_sae"
_WRAPPER = {"epoch", "model_state_dict", "optimizer_state_dict", "learning_rate"}


def recognise(content: Content) -> bool:
    """Its wrapper around a state dict of overcomplete."""
    return content.has(*_WRAPPER) and dictionary.WEIGHTS in content.nested("model_state_dict")


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (names, shapes), SpecError."""
    refuse_unknown(content.names, _WRAPPER, "a file of UniversalSAE")
    parts = overcomplete_parts.ask(content.nested("model_state_dict"), facts, default_norm="l2")
    facts.always("activation", "topk")
    k = facts.ask_int("k", "top_k of its yaml")
    about = "model_mean and model_std of its yaml, as input_std = model_std + 0.00001"
    scaling = facts.ask_scaling(about, d=parts.d)
    facts.settle()
    return overcomplete_parts.assembled(parts, TopK(k), "topk", scaling)
