"""Builds an open_clip model as an entry describes it, with random weights.

The model's configuration is one that open_clip ships with, by its name, or that of a folder or a
repository (`saebench.modelfiles`), `open_clip_config.json`. In a folder, a tokenizer's
`text_cfg.tokenizer_kwargs.bpe_path` is relative to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

import open_clip
from torch import nn

from saebench.errors import SpecError
from saebench.modelfiles import LOCAL, config_folder
from saebench.specs import BackboneSpec

_ARGS = (
    "force_quick_gelu",
    "force_custom_text",
    "force_image_size",
    "force_context_length",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
)


def build(spec: BackboneSpec) -> nn.Module:
    """The open_clip model of an entry, with random weights. Errors: SpecError."""
    where = spec.path or spec.name
    if unknown := [key for key in spec.model_args if key not in _ARGS]:
        raise SpecError(
            f"{where}: model_args.{unknown[0]} is not used for open_clip",
            f"these are: {', '.join(_ARGS)}; weights go under [weights]",
        )
    name = model_name(spec)
    text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    if "hf_model_name" in text:
        raise SpecError(
            f"{where}: the text tower of '{spec.model}' is the transformers library's "
            f"'{text['hf_model_name']}', which is not read here",
            "take a model whose text tower is open_clip's own, or write a loader of your own",
        )
    try:
        with _quiet():
            return open_clip.create_model(
                name, load_weights=False, pretrained_text=False, **spec.model_args
            )
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, OSError) as error:
        raise SpecError(f"{where}: open_clip cannot build '{spec.model}': {error}") from error


def model_name(spec: BackboneSpec) -> str:
    """The name that open_clip knows the model by: a folder or repository becomes a path.

    Errors: SpecError where there is no such model or folder; those of `saebench.hub.fetch`.
    """
    where = spec.path or spec.name
    if folder := config_folder(spec):
        return f"{LOCAL}{folder}"
    if spec.model not in open_clip.list_models():
        raise SpecError(
            f"{where}: open_clip has no model '{spec.model}'",
            f"{nearest_models(spec.model)}; a folder of your own is  local-dir:<folder>, "
            "a repository  hf-hub:owner/name",
        )
    return spec.model


def nearest_models(name: str) -> str:
    """A hint: open_clip's models of names like this one, or where all names are."""
    near = get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
    return f"the nearest: {', '.join(near)}" if near else "open_clip.list_models() has all names"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hush open_clip's warning that it loads no weights, which we do ourselves.

    It is logged through the root logger, and the first such call would also configure logging for
    the whole process, were there no handler.
    """
    before, handler = logging.root.manager.disable, logging.NullHandler()
    logging.disable(logging.WARNING)
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        logging.disable(before)
