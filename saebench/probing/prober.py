"""The probes of a run's units: looked for in the store, and what is not there fitted.

Once for a group, like `saebench.reading`. Units that ask for the same train images share one pass
over them; nothing is collected for a unit whose probes are all there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from saebench.backbones import Backbone
from saebench.data import Dataset
from saebench.errors import SaebenchError, is_out_of_memory
from saebench.images import rebased
from saebench.loading import Loaded
from saebench.probe_features import feature_of
from saebench.probe_options import needs_probes, shots_of
from saebench.probing.collect import Collector
from saebench.probing.collected import Asked
from saebench.probing.fits import Fits, Missing, Wanted
from saebench.probing.probes import Probes
from saebench.probing.sample import Sample, sample_of
from saebench.probing.taxonomy import n_classes_of, taxonomy_of
from saebench.store import Store
from saebench.together import Together
from saebench.units import Source, Unit


@dataclass(frozen=True)
class Fitting:
    """What is fitted of whom, on how many images; how many of the fits of a sample are done."""

    who: str
    what: str
    n_images: int
    done: int
    of: int


@dataclass
class Probing:
    """Probes of one backbone on one dataset, of the units of a wave.

    One that cannot be fitted is its own unit's error, and the others go on.
    """

    collector: Collector
    seed: int
    on_fit: Callable[[Fitting], None] = lambda fitting: None
    made: dict[Unit, Probes | Exception] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone:
        return self.collector.backbone

    @property
    def dataset(self) -> Dataset:
        return self.collector.dataset

    @property
    def source(self) -> Source:
        return self.collector.source

    @property
    def store(self) -> Store:
        return self.collector.store

    def prepare(self, units: Iterable[Unit], loaded: Loaded) -> None:
        """Find or fit what these units read; what others read is let go."""
        self.made.clear()
        by_images: dict[str, list[Wanted]] = {}
        for unit in units:
            if needs_probes(unit.task) and unit.coder not in loaded.errors:
                wanted = self._own(unit, lambda unit=unit: self._wanted(unit, loaded))
                if wanted is not None and not self._found(wanted):
                    by_images.setdefault(wanted.sample.key["images"], []).append(wanted)
        for some in sorted(by_images.values(), key=lambda some: len(some[0].sample)):
            self._fit(some, loaded)

    def error(self, unit: Unit) -> Exception | None:
        """Why the probes of a unit cannot be fitted."""
        found = self.made.get(unit)
        return found if isinstance(found, Exception) else None

    def of(self, unit: Unit) -> Probes | None:
        """The probes of a unit; None where it reads none."""
        found = self.made.get(unit)
        return found if isinstance(found, Probes) else None

    def _wanted(self, unit: Unit, loaded: Loaded) -> Wanted:
        place, coder = loaded.places[unit.coder], loaded.coders[unit.coder]
        assert not isinstance(coder, Together), "probes are of one coder at a time"
        kinds = rebased(self.backbone.spec.sites[place.site].kinds, place.kinds)
        feature = feature_of(unit.options["feature"], kinds, f"'{unit.coder.name}'")
        asked = Asked(unit, feature)
        missing = dict[str, str]()
        below = loaded.parents.get(unit.coder, ()) if feature.name == "embedding" else ()
        if coder.transcoder or any(one.transcoder for one in below):
            missing["xhat"] = "a transcoder's output is not an estimate of what it reads"
        if not coder.d_sae:
            missing["codes"] = "it has no latents"
        label, sample = unit.options["label"], self._sample(unit)
        return Wanted(
            asked,
            sample,
            self._levels(label)[0],
            coder.d_sae * len(feature.code_parts),
            unit.options["solver"],
            self.seed,
            {
                what: self.collector.key(unit, feature, what, sample, coder)
                for what in ("x", "xhat", "codes")
                if what not in missing
            },
            missing,
            label,
            _variant(unit),
            self._levels(label)[1],
        )

    def _sample(self, unit: Unit) -> Sample:
        choices = shots_of(unit.options), unit.options["label"]
        if choices not in self._samples:
            shots, label = choices
            manifest = self.dataset.manifest(self.source.spec.train)
            self._samples[choices] = sample_of(
                manifest, n=self.source.n_full, shots=shots, label=label, seed=self.seed
            )
        return self._samples[choices]

    @cached_property
    def _samples(self) -> dict[tuple[int | None, str], Sample]:
        return {}

    def _levels(self, label: str) -> tuple[int, Mapping[str, np.ndarray]]:
        """How many classes a label has, and the levels above them."""
        if label not in self._of_label:
            splits = (self.source.spec.train, self.source.spec.test)
            c = n_classes_of(self.dataset, splits, label)
            self._of_label[label] = c, taxonomy_of(self.dataset, splits, label)
        return self._of_label[label]

    @cached_property
    def _of_label(self) -> dict[str, tuple[int, Mapping[str, np.ndarray]]]:
        return {}

    def _found(self, wanted: Wanted) -> bool:
        """Whether all of a unit's probes are in the store."""
        try:
            found = Fits(wanted, self.store, self.backbone.device).probes()
        except Missing:
            return False
        self.made[wanted.asked.unit] = found
        return True

    def _fit(self, some: Sequence[Wanted], loaded: Loaded) -> None:
        """Collect what units need of the same images, and fit their probes one after the other."""
        asked = [wanted.asked for wanted in some]
        try:
            collected = self.collector.collect(asked, some[0].sample, loaded)
        except Exception as error:
            said = _of_memory(error, f"collecting what {len(some)} probes are fitted on")
            self.made.update({wanted.asked.unit: said for wanted in some})
            return
        count = _Count(sum(wanted.n_fits for wanted in some))
        for wanted in some:
            unit = wanted.asked.unit
            if error := collected.errors.get(unit):
                self.made[unit] = error
                continue
            missing = wanted.missing | collected.missing.get(unit, {})
            keys = {what: {**key, "batch": collected.batch} for what, key in wanted.keys.items()}
            wanted = replace(wanted, missing=missing, keys=keys)
            told = self._told(wanted, count)
            fits = Fits(wanted, self.store, self.backbone.device, collected, told, count.step)
            if found := self._own(unit, fits.probes):
                self.made[unit] = found

    def _told(self, wanted: Wanted, count: _Count) -> Callable[[str], None]:
        """How what is being fitted is said."""
        n, who = len(wanted.sample), wanted.asked.unit.coder.label
        return lambda what: self.on_fit(Fitting(who, what, n, count.done, count.of))

    def _own(self, unit: Unit, compute: Callable[[], Any]) -> Any:
        """What is computed for a unit; None where that fails, which is then its own error."""
        try:
            return compute()
        except Exception as error:
            self.made[unit] = _of_memory(error, f"fitting the probes of {unit.coder.label}")
            return None


@dataclass
class _Count:
    """Fits of a sample, all and done."""

    of: int
    done: int = 0

    def step(self) -> None:
        self.done += 1


def _of_memory(error: Exception, doing: str) -> Exception:
    """The same error; where memory ran out, one that says in what and what takes less."""
    if not is_out_of_memory(error):
        return error
    error.__traceback__ = None  # it holds the frames that hold the memory
    said = SaebenchError(
        f"memory ran out {doing}",
        "fewer train images:  --train-limit 50000,  or  --option linear_probe.solver=ridge",
    )
    said.__cause__ = error
    return said


def _variant(unit: Unit) -> dict[str, Any]:
    """What tells a unit's rows from those of the default options, by the columns of a row."""
    shots, label, options = shots_of(unit.options), unit.options["label"], unit.options
    found: dict[str, Any] = {"label": label} if label else {}
    if shots is not None:
        found["shots"] = shots
    for name in ("feature", "solver"):
        if options[name] != unit.task.options[name].default:
            found[name] = options[name]
    return found
