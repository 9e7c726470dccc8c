"""One table of each chunk of train images: what is in it, what identifies it, how it is filled.

Its identity is everything that can change its numbers on one machine, the batch size (a matrix
product rounds by its shape) and the kind of device included: so x and the x̂ of the identity control
are the same bit for bit, whichever of them was in the store before. That of clean features has no
SAE in it, unless they are the codes of one below, so that all SAEs on the same tokens share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from saebench.backbones import Backbone
from saebench.batch import CoderError
from saebench.coders import on_decoder, token_kinds
from saebench.errors import NonFiniteError
from saebench.finite import all_finite
from saebench.identity import content_hash
from saebench.probe_features import Feature, Pooling
from saebench.probing.features import clean_features, pooled_codes, reconstructed_features
from saebench.probing.tables import (
    CodesTable,
    CodesWriter,
    FeatureTable,
    FeatureWriter,
    Tables,
)
from saebench.saes import Coder
from saebench.specs import semantic_fields
from saebench.task import Batch
from saebench.together import Together
from saebench.units import Source, Unit

PROTOCOL = 1  # of what the numbers mean; that of the files is in `saebench.entries`

What = Literal["x", "xhat", "codes"]


@dataclass(eq=False)
class Job:
    """One kind of table, and the units that read it. pooling: of codes."""

    what: What
    feature: Feature
    fields: Mapping[str, Any]
    pooling: Pooling | None = None
    units: list[Unit] = field(default_factory=list)

    @cached_property
    def id(self) -> str:
        return content_hash(self.fields)

    def find(self, tables: Tables, fields: Mapping[str, Any]) -> FeatureTable | CodesTable | None:
        """The finished table of a chunk."""
        form = CodesTable if self.what == "codes" else FeatureTable
        return form.find(tables, fields)

    def begun(self, tables: Tables, fields: Mapping[str, Any], n: int) -> Filling:
        """The table of a chunk, still empty, one of n that are filled."""
        form = CodesWriter if self.what == "codes" else FeatureWriter
        return Filling(self, form(tables, fields, n))


@dataclass(eq=False)
class Filling:
    """A table of a chunk that is being written."""

    job: Job
    writer: FeatureWriter | CodesWriter

    def append(self, batch: Batch, places: np.ndarray) -> None:
        """Add the images of a batch, which stand at these places of the chunk.

        Errors: those of `SaeBatch`, NonFiniteError for clean features, WriteError.
        """
        job = self.job
        if isinstance(self.writer, CodesWriter):
            codes = pooled_codes(batch, job.feature, job.pooling or "none")
            latents, values = codes.indices_m.cpu().numpy(), codes.values_m.float().cpu().numpy()
            self.writer.append(places, codes.l0_n().cpu().numpy(), latents, values)
            return
        clean = job.what == "x"
        x_bf = (clean_features if clean else reconstructed_features)(batch, job.feature)
        if not all_finite(x_bf):
            which = "features" if clean else "features of its reconstructions"
            raise (NonFiniteError if clean else CoderError)(
                f"the {which} are NaN or infinite near image {batch.ids[0]}",
                "try --dtype float32, and look at the image",
            )
        self.writer.append(places, x_bf.cpu().numpy())


@dataclass(frozen=True)
class Keys:
    """What identifies the tables of a backbone on a dataset's train images."""

    backbone: Backbone
    source: Source
    dtype: str

    def fields(
        self,
        unit: Unit,
        feature: Feature,
        what: What,
        pooling: Pooling | None = None,
        *,
        coder: Coder | Together,
    ) -> dict[str, Any]:
        """All but the images, and how many of them were in a batch. coder: the unit's."""
        fields: dict[str, Any] = {
            "protocol": PROTOCOL,
            "what": what,
            "backbone": unit.identity["backbone"],
            "dataset": {"name": self.source.spec.name, **semantic_fields(self.source.spec)},
            "train": self.source.train_sha256,
            "dtype": self.dtype,
            "device": self.backbone.device.type,
        }
        if what != "x" or feature.parts:  # the embedding of untouched images has no tokens
            fields["tokens"] = self._tokens(unit)
        fields["feature"] = _slices(feature, "codes" if what == "codes" else "x")
        if what == "codes":
            fields["pooling"] = pooling
        elif feature.name == "embedding" and self.backbone.last_block != "full":
            fields["last_block"] = self.backbone.last_block
        return fields | (self._clean(unit, feature) if what == "x" else self._coder(unit, coder))

    def _tokens(self, unit: Unit) -> list[str]:
        """The kinds that are covered, however they are named; of a chain as its entry says."""
        ref = unit.coder
        if ref.site not in self.backbone.spec.sites:
            return [ref.tokens]
        return list(token_kinds(self.backbone.spec.sites[ref.site], ref.tokens, who=ref.name))

    def _clean(self, unit: Unit, feature: Feature) -> dict[str, Any]:
        """The coders below, where features are their codes."""
        if feature.name == "embedding" or unit.coder.sae is None:
            return {}
        skip = 2 if on_decoder(unit.coder.sae) else 1  # one on a decoder takes the SAE's place
        below = unit.identity["sae"]["saes"][skip:]
        return {"below": below} if below else {}

    def _coder(self, unit: Unit, coder: Coder | Together) -> dict[str, Any]:
        """The coder; of a control also what came of fitting it, since no name tells which images
        its fit left out.
        """
        fields: dict[str, Any] = {"sae": unit.identity["sae"]}
        if unit.coder.control:
            fields["seed"] = unit.identity["seed"]
            fields["n_train"] = self.source.n_train
            fields["fitted"] = numbers_hash(coder)
        return fields


_hashes: WeakKeyDictionary[object, str] = WeakKeyDictionary()


def numbers_hash(coder: object) -> str:
    """Of all the numbers that a coder is made of: a frozen dataclass of tensors, however deep."""
    if coder not in _hashes:
        digest = blake2b(digest_size=16)
        _add_numbers(digest, coder)
        _hashes[coder] = digest.hexdigest()
    return _hashes[coder]


def _add_numbers(digest: blake2b, value: object) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    elif isinstance(value, tuple):
        for one in value:
            _add_numbers(digest, one)
    elif is_dataclass(value):
        digest.update(type(value).__name__.encode())
        for part in fields(value):
            _add_numbers(digest, getattr(value, part.name))
    elif isinstance(value, int | float):
        digest.update(f"{value!r},".encode())


def _slices(feature: Feature, of: Literal["x", "codes"]) -> dict[str, Any]:
    """A feature in plain values. Codes of the same tokens are the same, whatever it is called."""
    parts = feature.code_parts if of == "codes" else feature.parts
    plain: dict[str, Any] = {"tokens": [[part.start, part.stop] for part in parts]}
    return plain if of == "codes" or parts else {"name": feature.name}


def refused(coder: Coder | Together, below: Sequence[Coder], feature: Feature) -> dict[str, str]:
    """`xhat` or `codes` -> why a coder has none, as far as it is known before it is tried."""
    why = {}
    if isinstance(coder, Together):
        return dict.fromkeys(("xhat", "codes"), "probes read what a single SAE makes of an image")
    if coder.transcoder:
        why["xhat"] = "it is a transcoder: what it writes is not an estimate of what it reads"
    elif feature.name == "embedding" and any(one.transcoder for one in below):
        why["xhat"] = "it reads the codes of a transcoder, which are decoded to another activation"
    if not coder.d_sae:
        why["codes"] = "it has no latents"
    return why
