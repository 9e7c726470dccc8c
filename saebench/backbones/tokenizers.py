"""The tokenizer of an open_clip text tower: texts -> int64 [n context].

CLIP's own comes with open_clip. A configuration that names another (`text_cfg.hf_tokenizer_name`:
SigLIP's and SigLIP 2's do) means files of a repository, which are fetched and locked like weights
(`saebench.hub`), and the transformers package that reads them. Neither is needed before texts are
encoded.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import open_clip

from saebench import hub
from saebench.backbones.open_clip_build import model_name
from saebench.errors import SpecError
from saebench.modelfiles import LOCAL, config_folder
from saebench.specs import BackboneSpec

_CONTEXT = open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH
_FAST = "tokenizer.json"  # all of a tokenizer in one file; where it is not, there are these
_SLOW = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_MORE = ("special_tokens_map.json", "added_tokens.json")
_LAST = "tokenizer_config.json"  # fetched after all others: once it is locked, so are they


def make_tokenizer(spec: BackboneSpec) -> Any:
    """open_clip's tokenizer of a model, with the configuration's own arguments.

    Errors: SpecError without the transformers package; those of `saebench.hub.fetch`.
    """
    name, text = model_name(spec), text_config(spec)
    context = spec.model_args.get("force_context_length")
    if not text.get("hf_tokenizer_name"):
        return open_clip.get_tokenizer(name, context, **_vocabulary(spec, text))
    if find_spec("transformers") is None:
        raise SpecError(
            f"{spec.path or spec.name}: the tokenizer of '{spec.model}' is read by the "
            "transformers package, which is not installed",
            "pip install 'saebench-vision[siglip]'",
        )
    own = spec.model.startswith(LOCAL)
    folder = config_folder(spec) if own else fetch_tokenizer(spec)
    return open_clip.tokenizer.HFTokenizer(
        str(folder),
        context_length=context or text.get("context_length", _CONTEXT),
        tokenizer_mode=text.get("tokenizer_mode"),
        trust_remote_code=False,
        **text.get("tokenizer_kwargs", {}),
    )


def fetch_tokenizer(spec: BackboneSpec) -> Path | None:
    """The folder of a tokenizer's files, fetched; None for one that comes with open_clip.

    Errors: those of `saebench.hub.fetch`.
    """
    last = tokenizer_wanted(spec)
    if last is None:
        return None
    if hub.known(last) is None:
        there = hub.files_of(last)
        vocabulary = (_FAST,) if _FAST in there else _SLOW
        for name in (*vocabulary, *_MORE):
            if name in there:
                hub.fetch(replace(last, names=(name,)))
        return hub.fetch(last).parent
    for name in (_FAST, *_SLOW, *_MORE):
        wanted = replace(last, names=(name,))
        if hub.known(wanted):
            hub.fetch(wanted)
    return hub.fetch(last).parent


def tokenizer_wanted(spec: BackboneSpec) -> hub.Wanted | None:
    """The file of a tokenizer that is fetched last; None for one that comes with open_clip."""
    repo = text_config(spec).get("hf_tokenizer_name", "")
    if not repo or spec.model.startswith(LOCAL):
        return None
    return hub.Wanted(repo, (_LAST,), spec.name)


def text_config(spec: BackboneSpec) -> dict[str, Any]:
    """`text_cfg` of an open_clip model's configuration."""
    config = open_clip.get_model_config(model_name(spec)) or {}
    return dict(config.get("text_cfg", {}))


def _vocabulary(spec: BackboneSpec, text: dict[str, Any]) -> dict[str, Any]:
    """A folder's vocabulary, found beside its configuration; open_clip would look in the cwd."""
    folder = config_folder(spec)
    bpe = text.get("tokenizer_kwargs", {}).get("bpe_path")
    return {} if folder is None or bpe is None else {"bpe_path": str(folder / bpe)}
