"""What probes a task asks for: its options said once and checked, and their part of an identity.

A task with `probes` in its needs has the options `feature`, `label`, `shots` and `solver`. Its
probes are fitted on all train images, or on `shots` of each class: with --shots 1 5 10 a unit each
more. Without torch, since all of this is known before a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saebench.coders import CoderRef
from saebench.data.dataset import Dataset
from saebench.errors import DataError, UsageError
from saebench.heads import PROBE
from saebench.probe_features import Feature, covered, feature_of, said_once
from saebench.registry import Registry
from saebench.specs import BackboneSpec, SiteSpec
from saebench.task import Task
from saebench.units import Source, Unit, root_site
from saebench.weights import weights_bytes

FEW_SHOT = 1  # rises when few-shot samples could come out otherwise
FULL = "full"  # value of the option `shots`
LONG = 2**15  # train images: a pass over more comes after all else that a run does
SPARSE = (1, 2, 5, 10, 20, 50, 100)  # latents of the k-sparse probes
BEST = 4096  # latents that a probe of a large dictionary is limited to
LARGEST = 2**26  # coefficients of a probe of codes


def needs_probes(task: type[Task]) -> bool:
    """Whether a task reads probes."""
    return "probes" in task.needs


def shots_of(options: Mapping[str, str]) -> int | None:
    """Train images a class; None: all there are. For options that were checked."""
    said = options.get("shots", FULL)
    return None if said == FULL else int(said)


def check_shots(tasks: Sequence[type[Task]], shots: Sequence[int]) -> None:
    """Errors: UsageError for --shots that no run, or none of these tasks, can have."""
    if wrong := [n for n in shots if n < 1]:
        raise UsageError(
            f"--shots {wrong[0]}: it has to be 1 or more",
            "train images a class, as in  --shots 1 5 10;  all there are is measured without it",
        )
    if shots and not any("shots" in task.options for task in tasks):
        raise UsageError(
            "--shots is for tasks that fit probes, and none of these does: "
            + ", ".join(task.name for task in tasks),
            "add  --task linear_probe,  or leave out --shots",
        )


def by_shots(
    task: type[Task], options: dict[str, str], shots: Sequence[int]
) -> list[dict[str, str]]:
    """The options of each unit of a task: as they are, and with each number of shots.

    Errors: UsageError for an option `shots` that is no number.
    """
    if "shots" not in task.options:
        return [options]
    asked = dict.fromkeys([_number_of_shots(task, options["shots"]), *map(str, shots)])
    return [{**options, "shots": one} for one in asked]


def _number_of_shots(task: type[Task], said: str) -> str:
    """'full', or a number in the one way of writing it."""
    if said == FULL:
        return said
    if not (said.isascii() and said.isdigit() and int(said)):
        raise UsageError(
            f"--option {task.name}.shots={said}: not a number of images a class",
            f"a whole number from 1 on, or {FULL}",
        )
    return str(int(said))


def feature_said_once(
    registry: Registry,
    backbone: BackboneSpec,
    coder: CoderRef,
    task: type[Task],
    options: dict[str, str],
) -> dict[str, str]:
    """The same options with the feature as `auto` where that is the same tokens of this coder.

    Errors: UsageError for tokens that it does not cover.
    """
    chosen = options.get("feature", "auto")
    if chosen == "auto":
        return options
    site = backbone.sites[root_site(registry, coder)]
    try:
        once = said_once(chosen, covered(site, coder), f"'{coder.label}'")
    except UsageError as error:
        what = f"--option {task.name}.feature={chosen}: {error.what}"
        raise UsageError(what, error.hint) from None
    return {**options, "feature": once}


def label_said_once(source: Source, options: dict[str, str]) -> dict[str, str]:
    """The same options with the label as '' where the level is the main label by another name."""
    level, dataset = options.get("label", ""), source.dataset
    if not level or dataset is None or level not in dataset.label_names:
        return options
    manifests = [dataset.manifest(split) for split in (source.spec.train, source.spec.test)]
    same = all(np.array_equal(m.levels[level], m.labels) for m in manifests)
    return {**options, "label": ""} if same else options


def check_probes(source: Source, task: type[Task], options: Mapping[str, str]) -> None:
    """Errors: UsageError for a label level that the dataset lacks; DataError where one class is
    all there is: there is nothing to tell apart; DataError for a stream of train images of which
    nobody said how many: the first few would be taken for all.
    """
    level, dataset = options.get("label", ""), source.dataset
    if dataset is None:
        return
    if level and level not in dataset.label_names:
        known = ", ".join(dataset.label_names)
        raise UsageError(
            f"--option {task.name}.label={level}: '{source.spec.name}' has no such label level",
            f"its levels: {known}; without the option it is the main label"
            if known
            else "it has the main label alone: leave out the option",
        )
    if source.first_alone:
        raise DataError(
            f"the train images of '{source.spec.name}' are a stream, of which the first "
            f"{source.n_train:,} are here: '{task.name}' fits its probes on all that there are",
            "say how many:  --train-limit N,  as many as the split has for all of it",
        )
    labels = labels_of(source, level)
    if len(labels) == 0 or (labels == labels[0]).all():
        what = f"level '{level}'" if level else "main label"
        raise DataError(
            f"the train images of '{source.spec.name}' are all of one class by their {what}: there "
            f"is nothing for '{task.name}' to tell apart",
            "it takes a dataset with labels:  saebench ls datasets",
        )


def class_names_of(dataset: Dataset, level: str) -> Sequence[str]:
    """The c classes of a label level; '' is the main label."""
    return dataset.label_names[level] if level else dataset.class_names


def labels_of(source: Source, level: str) -> np.ndarray:
    """[n] int64, the label of each row of the train manifest."""
    assert source.dataset is not None
    manifest = source.dataset.manifest(source.spec.train)
    return manifest.levels[level] if level else manifest.labels


def probes_identity(source: Source, options: Mapping[str, str]) -> dict[str, Any]:
    """What of a unit's probes can change a number, beside the options of its task."""
    if shots_of(options) is None:
        return {"probe": PROBE, "n_images": source.n_full}
    return {"probe": PROBE, "few_shot": FEW_SHOT}


def n_train_of(unit: Unit) -> int:
    """How many train images the probes of a unit look at, from above; 0: it reads none."""
    if not needs_probes(unit.task):
        return 0
    shots, dataset = shots_of(unit.options), unit.source.dataset
    if shots is None or dataset is None:
        return unit.source.n_full
    n_classes = len(class_names_of(dataset, unit.options.get("label", "")))
    return min(2 * shots * n_classes, len(dataset.manifest(unit.source.spec.train)))


def latents_at_most(ref: CoderRef, site: SiteSpec) -> int | None:
    """d_sae, from above; None where no weights are here to tell by.

    An SAE's weights are two matrices, of two bytes a number at least.
    """
    if ref.control == "identity":
        return site.width
    if ref.control in ("zero", "mean"):
        return 0
    if ref.control == "pca":
        return ref.k
    assert ref.sae is not None
    return weights_bytes(ref.sae) // (2 * 2 * site.width) or None


def feature_width(unit: Unit, site: SiteSpec, feature: Feature) -> int:
    """f. How wide an embedding is no entry says: counted as the widest site."""
    if feature.name == "embedding":
        return max(other.width for other in unit.backbone.sites.values())
    return len(feature.parts) * site.width


def probe_coefficients(unit: Unit, site: SiteSpec, d_sae: int) -> int:
    """Numbers of all probes of a unit, from above: on x, on x̂, on codes, k-sparse.

    A dictionary that is too large is read by its best latents; one that is smaller than it seems
    is not, and then has up to LARGEST coefficients.
    """
    dataset, options, ref = unit.source.dataset, unit.options, unit.coder
    if not needs_probes(unit.task) or dataset is None:
        return 0
    c = len(class_names_of(dataset, options.get("label", "")))
    feature = feature_of(options.get("feature", "auto"), covered(site, ref), ref.label)
    latents = d_sae * len(feature.code_parts)
    most = BEST * c if options.get("solver") == "ridge" else max(LARGEST, BEST * c)
    of_codes = len(feature.poolings) * min(latents * c, most)
    of_few = c * sum(k for k in SPARSE if k <= latents)
    return 2 * feature_width(unit, site, feature) * c + of_codes + of_few
