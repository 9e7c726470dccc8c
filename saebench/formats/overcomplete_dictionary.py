"""The dictionary D [s d] of overcomplete's SAEs: x̂ = z @ D, without a bias.

    dictionary._weights            D = norm(_weights)·exp(multiplier)
    dictionary.{W, C, Relax}       D = (stochastic(W) @ C + clip(Relax))·exp(multiplier)

norm is one of `MODES`: l2 and l1 divide each row by its length, max_l2 and max_l1 all rows by the
largest length. stochastic makes the rows of W shares of 1, clip makes no row of Relax longer than
delta. Neither the mode nor delta is in the file. The library writes back what it normalised, which
changes nothing when it is done again. So a file says by itself what it needs, unless it was saved
between a step of training and the next use; then it is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.errors import SpecError, WeightsError
from saebench.formats.facts import Facts

WEIGHTS = "dictionary._weights"
ARCHETYPAL = ("dictionary.W", "dictionary.C", "dictionary.Relax")
MULTIPLIER = "dictionary.multiplier"
MODES = ("l2", "max_l2", "l1", "max_l1", "identity")

_BEFORE_MULTIPLIERS = ("l2", "l1", "identity")  # its max_* divided each row by its own length
_EXACT = 5e-6  # what float32 lengths are off by
_FAR = 0.1  # more than a step of training does


def is_there(names: Collection[str]) -> bool:
    """Whether these names have a dictionary of overcomplete among them."""
    return WEIGHTS in names or set(ARCHETYPAL) <= set(names)


def needed(names: Collection[str]) -> tuple[str, ...]:
    """The tensors of the kind of dictionary that it is."""
    return (WEIGHTS,) if WEIGHTS in names else ARCHETYPAL


@dataclass(frozen=True)
class Norm:
    """How a dictionary is normalised. delta None: Relax is clipped already."""

    mode: str
    delta: float | None = None


def ask(floats: Mapping[str, Tensor], stored_dtype: str, facts: Facts, default: str = "") -> Norm:
    """The norm; `default`: the mode of the format, whatever the rows in the file are.

    Errors: WeightsError (shapes), SpecError.
    """
    _check(floats)
    rounding = max(_EXACT, torch.finfo(getattr(torch, stored_dtype)).eps)
    if WEIGHTS not in floats:
        facts.known("dictionary_norm", "archetypal")
        return Norm("archetypal", _ask_delta(floats, rounding, facts))
    return Norm(_ask_mode(floats, rounding, facts, default))


def _ask_mode(floats: Mapping[str, Tensor], rounding: float, facts: Facts, default: str) -> str:
    W_sd = floats[WEIGHTS]
    modes = MODES if MULTIPLIER in floats else _BEFORE_MULTIPLIERS
    if default:
        return facts.may_choose("dictionary_norm", modes, default)
    # What divides each row comes first: behind it the largest length is 1 too.
    likely = (mode for mode in ("l2", "l1", "max_l2", "max_l1") if mode in modes)
    done = next((mode for mode in likely if _off(W_sd, mode) <= rounding), "")
    if done:
        mode = facts.may_choose("dictionary_norm", modes, done, "file")
    else:
        lengths_s = W_sd.norm(dim=1)
        about = (
            "how the library normalises its rows, which were saved with lengths "
            f"{lengths_s.min():.3g} to {lengths_s.max():.3g}"
        )
        mode = facts.ask_choice("dictionary_norm", about, modes)
    if mode and (off := _off(W_sd, mode)) > _FAR:
        facts.note(f"dictionary_norm = {mode} changes the length of its rows by up to {off:.0%}")
    return mode


def _ask_delta(floats: Mapping[str, Tensor], rounding: float, facts: Facts) -> float | None:
    """A W that is stochastic was written back, and Relax was clipped together with it."""
    W_sm, _, relax_sd = (floats[name] for name in ARCHETYPAL)
    if float((stochastic(W_sm) - W_sm).abs().max()) <= rounding or not relax_sd.any():
        return None
    about = f"the longest that a row of Relax may be; saved: {relax_sd.norm(dim=1).max():.3g}"
    delta = facts.ask_number("delta", about)
    if delta < 0:
        raise SpecError(f"delta = {delta}", f"{about}: not below 0")
    return delta


def dictionary_of(floats: Mapping[str, Tensor], norm: Norm) -> Tensor:
    """D [s d] contiguous, as it is used; the stored tensor itself where nothing changes it."""
    if WEIGHTS in floats:
        D_sd = floats[WEIGHTS]
        if _off(D_sd, norm.mode) > _EXACT:
            D_sd = normalised(D_sd, norm.mode)
    else:
        W_sm, C_md, relax_sd = (floats[name] for name in ARCHETYPAL)
        if norm.delta is not None:
            relax_sd = clipped(relax_sd, norm.delta)
        D_sd = stochastic(W_sm) @ C_md + relax_sd
    return (D_sd * floats[MULTIPLIER].exp() if _multiplies(floats) else D_sd).contiguous()


def normalised(W_sd: Tensor, mode: str) -> Tensor:
    """A dictionary in one of `MODES`."""
    if mode == "identity":
        return W_sd
    lengths_s1 = _lengths(W_sd, mode)[:, None]
    return W_sd / (lengths_s1.amax() if mode.startswith("max") else lengths_s1 + 1e-8)


def stochastic(W_sm: Tensor) -> Tensor:
    """Rows that are not negative, and sum to 1 where anything is left of them."""
    shares_sm = W_sm.relu()
    return shares_sm / (shares_sm.sum(dim=1, keepdim=True) + 1e-8)


def clipped(relax_sd: Tensor, delta: float) -> Tensor:
    """Rows no longer than delta."""
    lengths_s1 = relax_sd.norm(dim=1, keepdim=True)
    return torch.where(lengths_s1 > delta, relax_sd * (delta / lengths_s1), relax_sd)


def _off(W_sd: Tensor, mode: str) -> float:
    """The most by which a mode changes the length of a row, relative."""
    if mode in ("identity", ""):
        return 0.0
    lengths_s = _lengths(W_sd, mode)
    if mode.startswith("max"):
        return abs(float(lengths_s.amax()) - 1)
    positive = lengths_s[lengths_s > 0]  # none in a dictionary of zeros or of NaN
    return float((positive - 1).abs().amax()) if len(positive) else 0.0


def _lengths(W_sd: Tensor, mode: str) -> Tensor:
    return torch.linalg.vector_norm(W_sd, ord=2 if mode.endswith("l2") else 1, dim=1)


def _multiplies(floats: Mapping[str, Tensor]) -> bool:
    return MULTIPLIER in floats and bool(floats[MULTIPLIER] != 0)


def _check(floats: Mapping[str, Tensor]) -> None:
    """Errors: WeightsError for tensors that make no dictionary."""
    shapes = {name: list(floats[name].shape) for name in needed(floats)}
    fits = all(len(shape) == 2 and 0 not in shape for shape in shapes.values())
    if fits and WEIGHTS not in floats:
        (s, m), C, relax = (shapes[name] for name in ARCHETYPAL)
        fits = C[0] == m and relax == [s, C[1]]
    if not fits:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise WeightsError(f"these make no dictionary: {listed}")
    if MULTIPLIER in floats and floats[MULTIPLIER].ndim != 0:
        raise WeightsError(f"{MULTIPLIER} has shape {list(floats[MULTIPLIER].shape)}, not []")
