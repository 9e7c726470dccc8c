"""Which rows a unit of `linear_probe` has: for each the metric, the score, and what stands beside.

One row a metric for each probe and measure, and beside it those that are not the default: another
pooling of the codes, and the levels above the classes. A row that cannot be measured says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from saebench.metrics.probe_scores import Score, What
from saebench.metrics.substitution import TOP_K
from saebench.probe_features import Pooling
from saebench.probing.probes import Fitted, Probes

KS = (1, 2, 5, 10, 20, 50, 100)  # latents of the k-sparse probes
SCORES = "ridge scores are no probabilities"
_NONE: Mapping[str, Any] = {}
SUFFIX: Mapping[What, str] = {"accuracy": "", "top5": "_top5", "macro": "_macro"}
EVERY: tuple[What, ...] = ("accuracy", "top5", "macro", "loss")


@dataclass(frozen=True)
class Asked:
    """One row. why: that there is no value; '' where there is one. baseline: of a difference."""

    metric: str
    score: Score
    why: str = ""
    variant: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def baseline(self) -> Score | None:
        return Score(self.score.what, self.score.than) if self.score.than else None


@dataclass(frozen=True)
class _Names:
    """A probe's metrics: its accuracy and loss, and how much these are more than those of x."""

    accuracy: str
    loss: str = ""
    delta: str = ""
    increase: str = ""
    whats: tuple[What, ...] = EVERY

    def of(self, what: What) -> tuple[str, str]:
        """The metric, and that of the difference; '' where there is none."""
        if what == "loss":
            return self.loss, self.increase
        return self.accuracy.format(SUFFIX[what]), self.delta.format(SUFFIX[what])


def _names(who: str) -> _Names:
    less = who.removeprefix("xhat_")
    return _Names(
        f"probe_accuracy_{who}{{}}",
        f"probe_loss_{who}",
        "" if who == "x" else f"probe_delta_{less}{{}}",
        "" if who == "x" else f"probe_loss_increase_{less}",
    )


def _sparse_names(k: int) -> _Names:
    return _Names(
        f"sparse_probe_accuracy_k{k}{{}}",
        f"sparse_probe_loss_k{k}",
        f"sparse_probe_delta_k{k}{{}}",
        f"sparse_probe_loss_increase_k{k}",
    )


_TREE = _Names("tree_accuracy_codes{}", delta="tree_delta_codes{}", whats=("accuracy", "macro"))


@dataclass(frozen=True)
class Rows:
    """The rows of a unit's probes. scores: they give no log-odds. no_xhat: why there is no x̂.

    n_latents: of the codes that the probes read.
    """

    probes: Probes
    scores: bool
    no_xhat: str
    n_latents: int

    def __iter__(self) -> Iterator[Asked]:
        probes, no_xhat = self.probes, self.no_xhat
        yield from self._of(_names("x"), "x", probes.x, "", levels=True)
        yield from self._of(_names("xhat_frozen"), "xhat_frozen", probes.x, no_xhat, levels=True)
        why = no_xhat or _unless(probes.xhat, "no probe was fitted on the reconstructions")
        yield from self._of(_names("xhat_refit"), "xhat_refit", probes.xhat, why, levels=True)
        yield from self._of_codes()
        for k in KS:
            fitted, few = probes.sparse.get(k), f"there are only {self.n_latents} latents"
            usual = few if k > self.n_latents else f"no probe of {k} latents was fitted"
            why = self.no_codes or _unless(fitted, usual)
            yield from self._of(_sparse_names(k), f"k{k}", fitted, why, pooling=self.pooling)
        why = self.no_codes or _unless(probes.tree, "no tree was fitted")
        yield from self._of(
            _TREE, "tree", None, why, pooling=self.pooling, columns=self.fitted_on("tree")
        )

    @property
    def no_codes(self) -> str:
        return self.probes.missing.get("codes", "")

    def fitted_on(self, what: Literal["tree", "single"]) -> dict[str, int]:
        """It is fitted on fewer train images, where there are very many."""
        looked = self.probes.looked.get(what)
        return {} if looked is None else {"n_train": looked}

    @property
    def pooling(self) -> Pooling:
        """The default one."""
        return next(iter(self.probes.codes), None) or self.probes.feature.poolings[0]

    def _of_codes(self) -> Iterator[Asked]:
        for pooling in self.probes.codes or (self.pooling,):
            fitted, usual = self.probes.codes.get(pooling), pooling == self.pooling
            why = self.no_codes or _unless(fitted, "no probe was fitted on the codes")
            more: Any = {"pooling": pooling, "levels": usual}
            more["variant"] = {} if usual else {"pooling": pooling}
            yield from self._of(_names("codes"), f"codes/{pooling}", fitted, why, **more)

    def _of(
        self,
        names: _Names,
        slot: str,
        fitted: Fitted | None,
        absent: str,
        *,
        levels: bool = False,
        pooling: str = "",
        variant: Mapping[str, Any] = _NONE,
        columns: Mapping[str, Any] = _NONE,
    ) -> Iterator[Asked]:
        """Rows of one probe. absent: why there is none."""
        columns = {**(fitted.columns if fitted else {}), **columns}
        columns |= {"pooling": pooling} if pooling else {}
        given = {**(fitted.variant if fitted else {}), **variant}
        note = fitted.note if fitted else ""
        for level in ("", *(self.probes.taxonomy if levels else ())):
            at, own = (f"@{level}", {**given, "level": level}) if level else ("", given)
            for what in ("accuracy", "loss") if level else names.whats:
                unmeasured = absent or self._unmeasured(what, level)
                metric, difference = names.of(what)
                if metric:
                    score = Score(what, slot + at)
                    yield Asked(metric, score, unmeasured, own, columns, note)
                if difference:
                    score = Score(what, slot + at, "x" + at)
                    yield Asked(difference, score, unmeasured, own, columns, note)

    def _unmeasured(self, what: What, level: str) -> str:
        if what == "top5" and self.probes.n_classes <= TOP_K:
            return f"there are only {self.probes.n_classes} classes"
        return SCORES if self.scores and (level or what == "loss") else ""


def _unless(fitted: object | None, why: str) -> str:
    return why if fitted is None else ""


def scores_of(rows: Sequence[Asked]) -> list[Score]:
    """What has to be evaluated for these rows."""
    measured = [row for row in rows if not row.why]
    baselines = [row.baseline for row in measured if row.baseline]
    return list(dict.fromkeys([*(row.score for row in measured), *baselines]))
