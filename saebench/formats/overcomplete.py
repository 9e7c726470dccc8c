"""overcomplete: the state dict of one of its SAEs, without any configuration.

    h  = relu(pre)                            pre and D: saebench.formats.overcomplete_parts
    z  = h                                    SAE
         the k largest of h                   TopKSAE, RATopKSAE
         h where h ≥ threshold                BatchTopKSAE, which does not store its threshold
         h where h ≥ exp(thresholds)          JumpSAE, RAJumpSAE: told by their thresholds [s]
         k steps of matching pursuit over D   MpSAE (saebench.pursuit), whatever encoder it has
    x̂  = z @ D

Nothing else tells the classes apart, so that it is asked for. Not read: OMPSAE, QSAE, encoders by
which tokens see each other, and modules that were pickled whole.
"""

from __future__ import annotations

from typing import Any

from saebench.activations import Activation, Threshold, TopK
from saebench.formats import overcomplete_dictionary as dictionary
from saebench.formats import overcomplete_parts, visaebench
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.overcomplete_parts import Parts
from saebench.inputs import Scaling
from saebench.pursuit import MatchingPursuit
from saebench.saes import Sae

NAME = "overcomplete"
_THRESHOLDS = "thresholds"
_PURSUIT = "matching_pursuit"
_KINDS = ("relu", "topk", "batchtopk", _PURSUIT)


def recognise(content: Content) -> bool:
    """Whether it has a dictionary of overcomplete, and was not exported for visaebench."""
    return dictionary.is_there(content.names) and not visaebench.recognise(content)


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (a kind that is not read, names, shapes), SpecError."""
    state = content.objects
    if _THRESHOLDS in state:
        kind = facts.known("activation", "jumprelu")
    else:
        about = "which SAE of overcomplete it is: SAE is relu; OMPSAE is not read"
        kind = facts.ask_choice("activation", about, _KINDS)
    read_here = (_THRESHOLDS,) if kind == "jumprelu" else ()
    parts = overcomplete_parts.ask(state, facts, ignored=read_here, encodes=kind != _PURSUIT)
    scaling = facts.may_scale(d=parts.d)
    if kind == _PURSUIT:
        k = facts.ask_int("k", "its steps of matching pursuit")
        if any(name.startswith("encoder.") for name in state):
            facts.note("it has an encoder, which matching pursuit does not use")
        facts.settle()
        return _pursuit(parts, k, scaling)
    activation = _activation(kind, state.get(_THRESHOLDS), facts)
    facts.settle()
    return overcomplete_parts.assembled(parts, activation, kind, scaling)


def _activation(kind: str, log_thresholds: Any, facts: Facts) -> Activation:
    if kind == "jumprelu":
        return overcomplete_parts.jump_relu(log_thresholds, facts)
    if kind == "topk":
        return TopK(facts.ask_int("k", "top_k, the latents that a row keeps"))
    if kind == "batchtopk":
        facts.always("strict", False)
        facts.may_count("k")  # of a row, for an estimate; the library's top_k is of a whole batch
        about = "running_threshold of the module, which a state dict does not hold"
        theta = facts.ask_number("threshold", about, estimate="threshold")
        return Threshold(theta, inclusive=True)
    if kind != "relu":
        facts.later("k", "threshold")
    return Threshold()


def _pursuit(parts: Parts, k: int, scaling: Scaling) -> Sae:
    D_sd = dictionary.dictionary_of(parts.floats, parts.norm)
    return Sae(
        W_enc_ds=D_sd.T,
        b_enc_s=D_sd.new_zeros(D_sd.shape[0]),
        W_dec_sd=D_sd,
        b_dec_d=D_sd.new_zeros(D_sd.shape[1]),
        activation=MatchingPursuit(k, D_sd),
        architecture="matching-pursuit",
        scaling=scaling,
        stored_dtype=parts.stored_dtype,
    )
