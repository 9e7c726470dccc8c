"""overcomplete: the state dict of one of its SAEs, without any configuration.

    h  = relu(pre)                            pre and D: saebench.formats.overcomplete_parts
    z  = h                                    SAE
         the k largest of h                   TopKSAE, RATopKSAE
         h where h ≥ threshold                BatchTopKSAE, which does not store its threshold
         h where h ≥ exp(thresholds)          JumpSAE, RAJumpSAE: told by their thresholds [s]
         k steps of matching pursuit over D   MpSAE, whatever encoder it has
         k of the orthogonal one              OMPSAE, likewise (both: saebench.pursuit)
    x̂  = z @ D

Nothing else tells the classes apart, so that it is asked for. Not read: QSAE, encoders by which
tokens see each other, and modules that were pickled whole.
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
from saebench.pursuit import MatchingPursuit, OrthogonalMatchingPursuit
from saebench.saes import Sae

NAME = "overcomplete"
_THRESHOLDS = "thresholds"
_PURSUIT, _ORTHOGONAL = "matching_pursuit", "orthogonal_matching_pursuit"
_PURSUITS = (_PURSUIT, _ORTHOGONAL)
_KINDS = ("relu", "topk", "batchtopk", *_PURSUITS)


def recognise(content: Content) -> bool:
    """Whether it has a dictionary of overcomplete, and was not exported for visaebench."""
    return dictionary.is_there(content.names) and not visaebench.recognise(content)


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (a kind that is not read, names, shapes), SpecError."""
    state = content.objects
    if _THRESHOLDS in state:
        kind = facts.known("activation", "jumprelu")
    else:
        about = f"the SAE of overcomplete: SAE is relu, MpSAE {_PURSUIT}, OMPSAE {_ORTHOGONAL}"
        kind = facts.ask_choice("activation", about, _KINDS)
    read_here = (_THRESHOLDS,) if kind == "jumprelu" else ()
    parts = overcomplete_parts.ask(state, facts, ignored=read_here, encodes=kind not in _PURSUITS)
    scaling = facts.may_scale(d=parts.d)
    if kind in _PURSUITS:
        k = facts.ask_int("k", "its steps of matching pursuit")
        about = "its steps of gradient descent for each latent"
        max_iter = facts.ask_int("max_iter", about) if kind == _ORTHOGONAL else None
        if any(name.startswith("encoder.") for name in state):
            facts.note("it has an encoder, which matching pursuit does not use")
        facts.settle()
        return _pursuit(parts, k, max_iter, scaling)
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


def _pursuit(parts: Parts, k: int, max_iter: int | None, scaling: Scaling) -> Sae:
    """`max_iter` is of the orthogonal one alone."""
    D_sd = dictionary.dictionary_of(parts.floats, parts.norm)
    if max_iter is None:
        pursuit, architecture = MatchingPursuit(k, D_sd), "matching-pursuit"
    else:
        pursuit = OrthogonalMatchingPursuit(k, max_iter, D_sd)
        architecture = "orthogonal-matching-pursuit"
    return Sae(
        W_enc_ds=D_sd.T,
        b_enc_s=D_sd.new_zeros(D_sd.shape[0]),
        W_dec_sd=D_sd,
        b_dec_d=D_sd.new_zeros(D_sd.shape[1]),
        activation=pursuit,
        architecture=architecture,
        scaling=scaling,
        stored_dtype=parts.stored_dtype,
    )
