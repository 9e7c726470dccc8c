"""The tokenizer of an open_clip text tower: texts -> int64 [n context].

CLIP's own comes with open_clip. A configuration that names another (`text_cfg.hf_tokenizer_name`:
SigLIP's and SigLIP 2's do) means files of a repository, which are fetched and locked like weights
(`saebench.modelfiles`), and the transformers package that reads them, which is not needed before
texts are encoded.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import open_clip

from saebench.backbones.open_clip_build import model_name
from saebench.errors import SpecError
from saebench.modelfiles import text_config, text_files
from saebench.specs import BackboneSpec

_CONTEXT = open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH


def make_tokenizer(spec: BackboneSpec) -> Any:
    """open_clip's tokenizer of a model, with the configuration's own arguments.

    Errors: SpecError without the transformers package; those of `saebench.modelfiles.text_files`.
    """
    name, text = model_name(spec), text_config(spec)
    context = spec.model_args.get("force_context_length")
    if not text.get("hf_tokenizer_name"):
        # Found beside the configuration; open_clip would look in the current folder.
        vocabulary = text_files(spec)
        own = {} if vocabulary is None else {"bpe_path": str(vocabulary)}
        return open_clip.get_tokenizer(name, context, **own)
    if find_spec("transformers") is None:
        raise SpecError(
            f"{spec.path or spec.name}: the tokenizer of '{spec.model}' is read by the "
            "transformers package, which is not installed",
            "pip install 'saebench-vision[siglip]'",
        )
    return open_clip.tokenizer.HFTokenizer(
        str(text_files(spec)),
        context_length=context or text.get("context_length", _CONTEXT),
        tokenizer_mode=text.get("tokenizer_mode"),
        trust_remote_code=False,
        **text.get("tokenizer_kwargs", {}),
    )
