"""What a run is made of: units, and the datasets they look at.

A unit is one (backbone, SAE or control, task, dataset) with everything that can change its
numbers, and that is its identity: canonical JSON, hashed. Its rows are one file under that hash;
the absence of the file is the only "not done". Not in it: batch size, device, package versions,
paths, descriptions, and where a dataset lies. Those are columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from saebench.beside import beside_sha256
from saebench.coders import CoderRef, chain_of
from saebench.data.access import Access
from saebench.data.captions import captions_sha256, evaluated_captions
from saebench.data.dataset import Dataset
from saebench.identity import content_hash
from saebench.modelfiles import model_files
from saebench.registry import Registry
from saebench.specs import BackboneSpec, DatasetSpec, SaeSpec, semantic_fields
from saebench.task import REPLICATES, Task
from saebench.weights import HUB_MODEL, weights_sha256

SEGMENT = 2048  # images; a protocol constant that shards and batches do not move
STATISTICS_IMAGES = 2048  # train images that means, covariances and control scales are fitted on

PROTOCOL = {"order": 1, "segments": SEGMENT, "bootstrap": 1, "replicates": REPLICATES, "fit": 1}


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset as a run sees it: what of the evaluation split, what of the train split."""

    spec: DatasetSpec
    test_sha256: str
    train_sha256: str
    n_images: int
    n_train: int  # images that statistics are fitted on
    n_probe: int = 0  # images that a linear head is fitted on
    n_full: int = 0  # images that the probes of a task are fitted on, where they are not few-shot
    access: Access = field(default_factory=Access)
    dataset: Dataset | None = None  # as it was opened to plan, so that it is listed once a run
    resolved_revision: str = ""  # of a hub dataset: the commit
    stratified: bool = True  # False: the images of a stream, in its own order
    first_alone: bool = False  # train images are the first of a stream, and nobody said how many

    @property
    def n_segments(self) -> int:
        return -(-self.n_images // SEGMENT)

    def texts_identity(self, names: str | None) -> dict[str, str]:
        """What of a dataset's texts a text tower reads: no manifest tells what classes are called.

        names: the kind of class names; None: none are read. Of captions, those of the images that
        are measured on count. Errors: DataError for an image without one.
        """
        found = {"captions": self._captions_sha256} if self._captions_sha256 else {}
        if names is not None and self.dataset is not None:
            found["names"] = content_hash(list(self.dataset.text_names.get(names, ())))
        return found

    @cached_property
    def _captions_sha256(self) -> str:
        return captions_sha256(evaluated_captions(self.dataset, self.spec.test, self.n_images))


@dataclass(frozen=True, eq=False)
class Unit:
    """One (backbone, coder, task, dataset): the smallest thing that is done or not done."""

    backbone: BackboneSpec
    coder: CoderRef
    task: type[Task]
    source: Source
    identity: dict[str, Any]
    conventions: bool = False  # only the rows of the peers' formulas
    options: Mapping[str, str] = field(default_factory=dict)  # every option of the task

    @cached_property
    def id(self) -> str:
        return content_hash(self.identity)[:32]

    @property
    def label(self) -> str:
        """Its names, and the options that are not the default."""
        names = (self.backbone.name, self.coder.label, self.task.name, self.source.spec.name)
        defaults = {name: option.default for name, option in self.task.options.items()}
        chosen = [f"{k}={v}" for k, v in self.options.items() if v != defaults.get(k)]
        return " · ".join([*names, *chosen])


def backbone_identity(spec: BackboneSpec, *sites: str) -> dict[str, Any]:
    """Everything about a backbone and its site, or sites, that can change its activations."""
    used = [semantic_fields(spec.sites[site]) for site in sites]
    return {
        "name": spec.name,
        **semantic_fields(spec),
        # A repository's files are known by their hashes, whatever commit they came from.
        "model": spec.model.partition("@")[0] if spec.model.startswith(HUB_MODEL) else spec.model,
        "weights": weights_sha256(spec),
        "model_files": model_files(spec),
        **({"site": used[0]} if len(used) == 1 else {"sites": used}),
    }


def head_identity(spec: BackboneSpec, dataset: DatasetSpec) -> dict[str, Any]:
    """What a backbone says of a dataset's classes: not what it says of other datasets."""
    head, outputs = spec.head, spec.head.outputs(dataset)
    fields: dict[str, Any] = {"kind": head.kind}
    if head.kind == "classifier":
        fields["outputs"] = [outputs.start, outputs.stop] if outputs else None
    if head.kind == "zero_shot":
        own = head.templates.get(dataset.name)
        given = dataset.templates if own is None else own
        fields["templates"] = given if isinstance(given, str) else list(given)
    return fields


def coder_identity(registry: Registry, ref: CoderRef) -> dict[str, Any]:
    """Everything about an SAE or control that can change a number, its parents included."""
    fields: dict[str, Any] = {"name": ref.name, "site": ref.site, "tokens": ref.tokens}
    if ref.members:
        return {**fields, "together": [coder_identity(registry, ref) for ref in ref.members]}
    if ref.control:
        fields |= {"control": ref.control, "k": ref.k}
    if ref.sae:
        fields["saes"] = [_sae_identity(link) for link in chain_of(registry, ref.sae)]
    return fields


def _sae_identity(spec: SaeSpec) -> dict[str, Any]:
    fields = {"name": spec.name, **semantic_fields(spec), "weights": weights_sha256(spec)}
    # What is in the statistics counts, not what their file is called.
    fields["semantics"] = {k: v for k, v in fields["semantics"].items() if k != "statistics"}
    if beside := beside_sha256(spec):  # those that have none keep the ids of before there were any
        fields["beside"] = beside
    return fields


def root_site(registry: Registry, ref: CoderRef) -> str:
    """The site of the backbone itself that an SAE, or the chain it sits on, reads.

    Of several spliced together, the first.
    """
    return root_sites(registry, ref)[0]


def root_sites(registry: Registry, ref: CoderRef) -> tuple[str, ...]:
    """The same of each member of a set."""
    return tuple(
        chain_of(registry, part.sae)[-1].site if part.sae else part.site for part in ref.parts
    )
