"""Builds a timm model as an entry describes it, with random weights.

The model is one that timm knows by name, or a configuration's: `local-dir:<folder>` or
`hf-hub:owner/name` (`saebench.modelfiles`), whose `config.json` is in timm's form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any
from weakref import WeakKeyDictionary

import timm
from timm.models import _builder
from torch import Tensor, nn

from saebench.errors import SpecError
from saebench.modelfiles import LOCAL, config_folder
from saebench.specs import BackboneSpec

# Weights come from [weights] only, where their hash is checked.
_RESERVED = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")

Filter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]
_filters: WeakKeyDictionary[nn.Module, Filter] = WeakKeyDictionary()


def build(spec: BackboneSpec) -> nn.Module:
    """The timm model of an entry, with random weights. Errors: SpecError."""
    where = spec.path or spec.name
    for key in _RESERVED:
        if key in spec.model_args:
            raise SpecError(f"{where}: model_args.{key} is not used", "weights go under [weights]")
    name, architecture = _names(spec)
    own = timm.models.model_entrypoint(architecture).__module__.startswith("timm.")
    try:
        with _kept() as kept:
            module = timm.create_model(name, pretrained=own, **spec.model_args)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise SpecError(
            f"{where}: timm cannot build '{spec.model}' with {dict(spec.model_args)}: {error}",
            f"see the arguments of timm's {architecture}",
        ) from error
    if kept:
        _filters[module] = kept[0]
    return module


def checkpoint_filter(module: nn.Module) -> Filter | None:
    """What timm itself puts a checkpoint of this model through before it loads it, if anything.

    It turns the names of the original releases into timm's, and resamples position embeddings to
    the model's grid.
    """
    return _filters.get(module)


def nearest_models(name: str) -> str:
    """A hint: timm's models of names like this one, or where all names are."""
    near = get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    return f"the nearest: {', '.join(near)}" if near else "timm.list_models() has all names"


def _names(spec: BackboneSpec) -> tuple[str, str]:
    """The name that timm is given, and its architecture. Errors: SpecError for one unknown."""
    where, folder = spec.path or spec.name, config_folder(spec)
    if folder is None:
        architecture = spec.model.partition(".")[0]
        if not timm.is_model(spec.model):
            raise SpecError(
                f"{where}: timm has no model '{spec.model}'", nearest_models(architecture)
            )
        return spec.model, architecture
    file = folder / "config.json"
    try:
        architecture = json.loads(file.read_text(encoding="utf-8"))["architecture"]
    except (ValueError, KeyError, TypeError):
        raise SpecError(
            f"{where}: {file} is not a configuration of timm's: it names no architecture",
            "a model in the form of the transformers library is not read; timm has most of them "
            "under its own names:  https://huggingface.co/timm",
        ) from None
    if not timm.is_model(architecture):
        raise SpecError(
            f"{where}: {file} is of '{architecture}', which this timm ({timm.__version__}) has not",
            "a newer timm may:  pip install -U timm",
        )
    return f"{LOCAL}{folder}", architecture


@contextmanager
def _kept() -> Iterator[list[Filter]]:
    """While a model is built as a pretrained one, keep how its weights would be converted.

    Which function that is, and with which arguments, is known inside of timm's function for each
    family only: it hands both to `load_pretrained`, which is kept from loading anything.
    """
    builder: Any = _builder
    kept: list[Filter] = []

    def keep(model: nn.Module, *_: Any, filter_fn: Filter | None = None, **__: Any) -> None:
        if filter_fn is not None:
            kept.append(filter_fn)

    before = builder.load_pretrained
    builder.load_pretrained = keep
    try:
        yield kept
    finally:
        builder.load_pretrained = before
