"""The heads that the tasks of a group read: each made once, for all who choose the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from saebench.backbones import Backbone
from saebench.data import Dataset
from saebench.errors import is_out_of_memory
from saebench.fit import Fit, Fitter
from saebench.readouts import Readouts, build_readouts, fits_ahead
from saebench.units import Source, Unit

Choices = tuple[tuple[str, str], ...]


@dataclass
class Reading:
    """Readouts of one backbone on one dataset, by the choices of units (`head`, `names`).

    A head that cannot be made is its own units' error, and the others go on.
    """

    backbone: Backbone
    dataset: Dataset
    source: Source
    made: dict[Choices, Readouts | Exception] = field(default_factory=dict)

    def ahead(self, units: Iterable[Unit]) -> list[Callable[[], Fit]]:
        """What begins the fits that will be asked for: they share the pass of other fits."""
        return [
            fit
            for choices in self._missing(units)
            for fit in fits_ahead(self.backbone, self.dataset, **dict(choices))
        ]

    def prepare(self, units: Iterable[Unit], fitter: Fitter) -> None:
        """Make what units read and is not there yet."""
        for choices in self._missing(units):
            try:
                self.made[choices] = build_readouts(
                    self.backbone, self.dataset, self.source, fitter, **dict(choices)
                )
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self.made[choices] = error

    def error(self, unit: Unit) -> Exception | None:
        """Why the heads that a unit reads cannot be made."""
        found = self.made.get(choices_of(unit))
        return found if reads(unit) and isinstance(found, Exception) else None

    def of(self, unit: Unit) -> Readouts | None:
        """The heads that a unit reads; None where it reads none."""
        found = self.made.get(choices_of(unit))
        return found if reads(unit) and isinstance(found, Readouts) else None

    def _missing(self, units: Iterable[Unit]) -> list[Choices]:
        asked = dict.fromkeys(choices_of(unit) for unit in units if reads(unit))
        return [choices for choices in asked if choices not in self.made]


def reads(unit: Unit) -> bool:
    """Whether a unit's task reads heads."""
    return "readouts" in unit.task.needs


def choices_of(unit: Unit) -> Choices:
    """What of a unit's options chooses its heads."""
    return tuple((name, unit.options[name]) for name in ("head", "names") if name in unit.options)
