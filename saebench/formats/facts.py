"""The facts that decide an SAE's forward pass: what a file says, and what somebody has to say.

A reader asks for every fact through `Facts`. What the file, its configuration or the format says is
`known`; what none of them says is `asked` of the entry's [semantics] or of `load_sae(…, fact=…)`.
All that is missing is refused at once, with the choices: nothing is guessed. What is given and
contradicts the file is refused too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from saebench.errors import SpecError
from saebench.inputs import RowNorm, Scaling
from saebench.record import Fact, Record

Estimate = Literal["", "threshold", "standardise", "zscore", "mean_norm", "norm"]
"""What `saebench estimate` can do about a missing fact:

threshold    the mean over batches of the least value that a top k·b of the batch keeps
standardise  (x − mean[d]) / s, s² the mean over dimensions of the variances      (visaebench)
zscore       (x − mean[d]) / std[d]                                               (CLIP-Scope)
mean_norm    (x − mean[d]) / (mean of ‖x − mean‖ / √d)                            (saev)
norm         x / (mean of ‖x‖ / √d)                                               (SAELens)
"""

INPUT = ("input", "input_mean", "input_std")  # the facts that `ask_scaling` asks for


@dataclass(frozen=True)
class Missing:
    """A fact that nobody says. `choices` is what may be written, as a reader would write it."""

    name: str
    about: str
    choices: str
    estimate: Estimate = ""


class MissingFacts(SpecError):
    """What has to be said before an SAE can be read."""

    def __init__(self, missing: Sequence[Missing]) -> None:
        self.missing = tuple(missing)
        listed = "; ".join(f"{one.name} ({one.about})" for one in missing)
        written = "   or   ".join(f"{one.name} = {one.choices}" for one in missing[:1])
        if len(missing) > 1:
            written = "   ".join(f"{one.name} = {one.choices}" for one in missing)
        hint = f"write under [semantics]:   {written}"
        if any(one.estimate for one in missing):
            hint += "   (saebench estimate  finds it from train activations)"
        super().__init__(f"the file does not say: {listed}", hint)


class Facts:
    """Collects the facts of one SAE, and where each came from."""

    def __init__(
        self,
        given: Mapping[str, Any] | None = None,
        *,
        giver: str = "given",
        estimated: Mapping[str, Any] | None = None,
    ) -> None:
        """`given` by `giver` (`entry`, or `given` in Python); `estimated` from a statistics file.

        A None that is given says nothing. Errors: SpecError for a fact that is both.
        """
        given, estimated = _said(given), dict(estimated or {})
        if both := set(given) & set(estimated):
            raise SpecError(
                f"{', '.join(sorted(both))}: given, and in the statistics file too", "keep one"
            )
        self._given = {**given, **estimated}
        self._giver = {**dict.fromkeys(given, giver), **dict.fromkeys(estimated, "estimated")}
        self._asked: set[str] = set()
        self._missing: list[Missing] = []
        self._facts: dict[str, Fact] = {}
        self._promised: dict[str, Any] = {}
        self._notes: list[str] = []
        self._trained_on: dict[str, str] = {}

    def also(self, given: Mapping[str, Any], giver: str) -> Facts:
        """Takes what another giver says too. Errors: SpecError where it contradicts the first."""
        for name, value in _said(given).items():
            if name in self._given and not _same(self._given[name], value):
                raise SpecError(
                    f"{name} = {_shown(value)} is {giver}, and {_shown(self._given[name])} is "
                    f"{self._giver[name]}",
                    "keep one",
                )
            self._given.setdefault(name, value)
            self._giver.setdefault(name, giver)
        return self

    # --- what is known ---

    def known(self, name: str, value: Any, source: str = "file") -> Any:
        """A fact that the file, its configuration (`source`: its name) or the format says.

        What is given may repeat it. Errors: SpecError where it says otherwise.
        """
        self._asked.add(name)
        if name in self._given and not _same(self._given[name], value):
            raise SpecError(
                f"{name} = {_shown(self._given[name])} is {self._giver[name]}, and the {source} "
                f"says {_shown(value)}",
                f"remove  {name}  from what is given",
            )
        self._facts[name] = Fact(name, _plain(value), source)
        return value

    def always(self, name: str, value: Any) -> Any:
        """A fact that is so in every file of the format."""
        return self.known(name, value, "format")

    def promise(self, name: str, value: Any) -> None:
        """A fact that its makers' code keeps so, which a file may break: `measured` says."""
        self._promised[name] = value

    def measured(self, name: str, value: Any, found: str) -> None:
        """A fact of the stored numbers. Where it was promised otherwise, a note of what is found.

        Errors: as `known`.
        """
        self.known(name, value)
        if (promised := self._promised.get(name, value)) != value:
            self.note(f"its makers' code keeps {name} = {promised}, and {found}")

    def note(self, text: str) -> None:
        """Something that a reader of results should know about this SAE."""
        self._notes.append(text)

    def trained_on(self, **words: Any) -> None:
        """What the file says of its activations: model, hook, tokens, dataset. None is left out."""
        self._trained_on |= {key: str(value) for key, value in words.items() if value is not None}

    # --- what has to be said ---

    def ask_choice(self, name: str, about: str, choices: Sequence[str]) -> str:
        """One of some words; "" while it is missing."""
        found = self._ask(name, about, " | ".join(f'"{choice}"' for choice in choices))
        if found is not None and not (isinstance(found, str) and found in choices):
            raise self._wrong(name, "one of " + ", ".join(choices))
        return found or ""

    def ask_bool(self, name: str, about: str) -> bool:
        """True or false; False while it is missing."""
        found = self._ask(name, about, "true | false")
        if found is not None and not isinstance(found, bool):
            raise self._wrong(name, "true or false")
        return bool(found)

    def ask_int(self, name: str, about: str, *, estimate: Estimate = "") -> int:
        """A number of 1 or more; 1 while it is missing."""
        found = self._ask(name, about, "a whole number", estimate)
        if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
            raise self._wrong(name, "a whole number")
        if found is not None and found < 1:
            raise self._wrong(name, "1 or more")
        return found or 1

    def ask_number(self, name: str, about: str, *, estimate: Estimate = "") -> float:
        """A finite number; 0.0 while it is missing."""
        found = self._ask(name, about, "a number", estimate)
        if isinstance(found, Tensor) and found.ndim == 0:
            found = float(found)
        if found is not None and not _is_number(found):
            raise self._wrong(name, "a finite number")
        return float(found or 0.0)

    # --- what may be said: what is given holds, else `default`, as `source` has it ---

    def may_choose(
        self, name: str, choices: Sequence[str], default: str, source: str = "format"
    ) -> str:
        """One of some words."""
        if name in self._given:
            return self.ask_choice(name, "", choices)
        return self.known(name, default, source)

    def may_bool(self, name: str, default: bool, source: str = "format") -> bool:
        """True or false."""
        if name in self._given:
            return self.ask_bool(name, "")
        return self.known(name, default, source)

    def may_int(self, name: str, default: int, source: str = "format") -> int:
        """A number of 1 or more."""
        if name in self._given:
            return self.ask_int(name, "")
        return self.known(name, default, source)

    def may_number(self, name: str, default: float, source: str = "format") -> float:
        """A finite number."""
        if name in self._given:
            return self.ask_number(name, "")
        return self.known(name, default, source)

    def may_count(self, name: str) -> int | None:
        """A number of 1 or more, and None where nobody says: there is no default."""
        self._asked.add(name)
        return self.ask_int(name, "") if name in self._given else None

    # --- how the input was scaled ---

    def ask_scaling(
        self, about: str, *, d: int, estimate: Estimate = "", rows: RowNorm | None = None
    ) -> Scaling:
        """How x was scaled before the SAE saw it: (x − input_mean) / input_std, or raw.

        Asked as input = "raw", or as input_mean and input_std (numbers, or d numbers each), of
        which one may be left out. `rows` is what the SAE itself does to each row behind it.
        """
        self._asked |= set(INPUT)
        mean, std = self._take("input_mean"), self._take("input_std")
        raw = self._take("input")
        if raw is not None and raw != "raw":
            raise self._wrong("input", '"raw", or nothing beside input_mean and input_std')
        if raw is not None and (mean is not None or std is not None):
            raise SpecError('input = "raw" and input_mean or input_std are both there', "keep one")
        if raw is None and mean is None and std is None:
            choices = '"raw", or input_mean = … and input_std = …'
            self._missing.append(Missing("input", about, choices, estimate))
            return Scaling(rows=rows)
        scale: Tensor | float = 1.0
        if std is not None:
            divisor = self._vector("input_std", std, d)
            if not (divisor > 0).all():
                raise self._wrong("input_std", "above 0")
            scale = 1 / float(std) if _is_number(std) else (1 / divisor.double()).float()
        mean_d = None if mean is None else self._vector("input_mean", mean, d)
        return Scaling(mean_d, scale, rows)

    def may_scale(self, *, d: int) -> Scaling:
        """As `ask_scaling`, and raw where nobody says."""
        if set(INPUT) & set(self._given):
            return self.ask_scaling("", d=d)
        self._asked |= set(INPUT)
        self.known("input", "raw", "format")
        return Scaling()

    # --- all of them ---

    def later(self, *names: str) -> None:
        """What is asked for once a missing fact is there: until then it may be given or not."""
        self._asked |= set(names)

    def settle(self) -> None:
        """To be called when all has been asked, before the SAE is built.

        Errors: MissingFacts naming everything that nobody says; SpecError for what was given and
        nobody asked for.
        """
        if strange := sorted(set(self._given) - self._asked):
            known = ", ".join(sorted(self._asked)) or "nothing"
            raise SpecError(
                f"{', '.join(strange)}: an SAE of this format has no such fact",
                f"what can be said of it: {known}",
            )
        if self._missing:
            raise MissingFacts(self._missing)

    def record(self, format_name: str) -> Record:
        """Everything that was collected."""
        facts = tuple(self._facts.values())
        return Record(format_name, facts, tuple(self._notes), dict(self._trained_on))

    def _ask(self, name: str, about: str, choices: str, estimate: Estimate = "") -> Any:
        self._asked.add(name)
        if name not in self._given:
            self._missing.append(Missing(name, about, choices, estimate))
            return None
        return self._take(name)

    def _take(self, name: str) -> Any:
        if name not in self._given:
            return None
        value = self._given[name]
        self._facts[name] = Fact(name, _plain(value), self._giver[name])
        return value

    def _vector(self, name: str, value: Any, d: int) -> Tensor:
        """[d] float32 of a number or of d numbers."""
        if _is_number(value):
            return torch.full((d,), float(value))
        if any(isinstance(one, bool) for one in (value if isinstance(value, list) else [value])):
            raise self._wrong(name, f"a number or {d} numbers")
        try:
            vector = torch.as_tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise self._wrong(name, f"a number or {d} numbers") from None
        if vector.ndim == 0:
            vector = vector.expand(d).clone()
        if list(vector.shape) != [d] or not torch.isfinite(vector).all():
            raise self._wrong(name, f"a number or {d} finite numbers")
        return vector

    def _wrong(self, name: str, what: str) -> SpecError:
        value = _shown(self._given[name])
        return SpecError(f"{name} = {value} ({self._giver[name]})", f"{name} has to be {what}")


def _said(given: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (given or {}).items() if value is not None}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -float("inf") < value < float("inf")


def _same(a: Any, b: Any) -> bool:
    if _is_number(a) and _is_number(b):
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b))  # a float32, and what was typed of it
    return np.array_equal(a, b)


def _plain(value: Any) -> Any:
    """A fact's value as it is printed: of a tensor with many values, only what it is."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else f"{list(value.shape)} values"
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"[{len(value)}] values"
    return value


def _shown(value: Any) -> str:
    return repr(_plain(value))
