"""Files besides the weights that decide what a model is: its configuration and its vocabulary.

`model = "local-dir:<folder>"` names a folder of the user's, relative to the entry, and
`model = "hf-hub:owner/name@revision"` a repository whose configuration is fetched and locked
(`saebench.hub`) into a folder. Either holds `config.json` for timm or `open_clip_config.json` for
open_clip, in the library's own form. Under any other name the configuration is the library's.

An open_clip configuration may name a vocabulary, `text_cfg.tokenizer_kwargs.bpe_path`, relative to
it; or a tokenizer of the transformers library, `text_cfg.hf_tokenizer_name` (SigLIP's do): the
repository that has it, unless the model is a folder of the user's, which then has it too.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from saebench import hub
from saebench.errors import SpecError
from saebench.identity import file_sha256
from saebench.specs import BackboneSpec
from saebench.weights import hub_model, weights_of

LOCAL = "local-dir:"
_CONFIG = {"timm": "config.json", "open_clip": "open_clip_config.json"}

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
# The last is resolved after all others: once it is locked, so are they.
_TOKENIZER = (_FAST, *_SLOW, *_MORE, "tokenizer_config.json")


def config_wanted(spec: BackboneSpec) -> hub.Wanted | None:
    """The configuration that a model wants of a hub; None where it wants none."""
    repo, revision = hub_model(spec)
    return hub.Wanted(repo, (_CONFIG[spec.loader],), spec.name, revision) if repo else None


def config_folder(spec: BackboneSpec) -> Path | None:
    """The folder of a model's configuration, fetched where it is a hub's; None for a plain name.

    Errors: SpecError for a folder without it; those of `hub.fetch`.
    """
    if wanted := config_wanted(spec):
        return hub.fetch(wanted).parent
    if not spec.model.startswith(LOCAL) or spec.loader not in _CONFIG:
        return None
    folder = (Path(spec.path).parent / spec.model.removeprefix(LOCAL)).resolve()
    if not (folder / _CONFIG[spec.loader]).is_file():
        raise SpecError(
            f"{spec.path or spec.name}: {folder} has no {_CONFIG[spec.loader]}",
            'model = "local-dir:<folder>" is relative to the entry\'s own folder',
        )
    return folder


def model_files(spec: BackboneSpec) -> dict[str, str]:
    """sha256 of the files that decide what a model is, by name; none for a model known by name.

    The configuration of a folder or a repository, and what of it or of another repository turns
    texts into tokens: of a repository only where texts are measured with (`head.kind` is
    zero_shot). Weights are not among them (`saebench.weights`).
    Errors: as `config_folder`, `text_wanted`.
    """
    if wanted := config_wanted(spec):
        files = {wanted.names[0]: hub.resolve(wanted).sha256}
    elif folder := config_folder(spec):
        names = (_CONFIG[spec.loader], *_text_names(spec, folder))
        files = {name: file_sha256(folder / name) for name in names}
    else:
        files = {}
    if spec.head.kind == "zero_shot":
        files |= {file.names[0]: hub.resolve(file).sha256 for file in text_wanted(spec)}
    return files


def text_config(spec: BackboneSpec) -> dict[str, Any]:
    """`text_cfg` of an open_clip model's configuration; empty where there is none.

    open_clip's own configurations are read from its folder: importing it takes seconds, and who
    plans needs no model. Errors: SpecError; those of `config_folder`.
    """
    if spec.loader != "open_clip":
        return {}
    if folder := config_folder(spec):
        path = folder / _CONFIG[spec.loader]
    elif (package := find_spec("open_clip")) and package.origin:
        path = Path(package.origin).parent / "model_configs" / f"{spec.model}.json"
    else:
        return {}
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
        return dict(config.get("model_cfg", config).get("text_cfg", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise SpecError(
            f"{spec.path or spec.name}: {path} is no configuration of open_clip: {error}"
        ) from None


def text_wanted(spec: BackboneSpec) -> list[hub.Wanted]:
    """The files of a hub that turn a model's texts into tokens; none where it needs none.

    The hub is asked which there are where that is not locked. Errors: as `hub.files_of`.
    """
    files = text_candidates(spec)
    if len(files) < 2:
        return files
    *others, last = files
    if hub.known(last):
        return [*(file for file in others if hub.known(file)), last]
    there = hub.files_of(last)
    if _FAST in there:
        there = [name for name in there if name not in _SLOW]
    return [*(file for file in others if file.names[0] in there), last]


def text_candidates(spec: BackboneSpec) -> list[hub.Wanted]:
    """The files that `text_wanted` chooses from; the last one is always among them.

    Asks nobody, except for a configuration that is not here yet. Errors: as `text_config`.
    """
    if spec.model.startswith(LOCAL):
        return []
    text, (repo, revision) = text_config(spec), hub_model(spec)
    if tokenizer := text.get("hf_tokenizer_name"):
        weights = weights_of(spec)
        if tokenizer == weights.hub:  # of the same commit
            revision = weights.revision or ""
        elif tokenizer != repo:
            revision = ""
        return [hub.Wanted(tokenizer, (name,), spec.name, revision) for name in _TOKENIZER]
    bpe = _bpe(text)
    return [hub.Wanted(repo, (bpe,), spec.name, revision)] if repo and bpe else []


def text_files(spec: BackboneSpec) -> Path | None:
    """Where a model's texts find what turns them into tokens, fetched where it is on a hub.

    The folder of a tokenizer of the transformers library, or the file of a vocabulary; None for
    what comes with open_clip. Errors: SpecError for a file that is not there; those of `hub.fetch`.
    """
    text = text_config(spec)
    if spec.model.startswith(LOCAL) and (folder := config_folder(spec)):
        names = _text_names(spec, folder)
        if text.get("hf_tokenizer_name"):
            return folder
        return folder / names[0] if names else None
    paths = [hub.fetch(file) for file in text_wanted(spec)]
    if not paths:
        return None
    return paths[-1].parent if text.get("hf_tokenizer_name") else paths[-1]


def _text_names(spec: BackboneSpec, folder: Path) -> list[str]:
    """The files of a user's folder that turn texts into tokens."""
    text = text_config(spec)
    if text.get("hf_tokenizer_name"):
        return [name for name in _TOKENIZER if (folder / name).is_file()]
    bpe = _bpe(text)
    if bpe and not (folder / bpe).is_file():
        raise SpecError(
            f"{spec.path or spec.name}: there is no vocabulary {folder / bpe}",
            "text_cfg.tokenizer_kwargs.bpe_path is relative to open_clip_config.json",
        )
    return [bpe] if bpe else []


def _bpe(text: dict[str, Any]) -> str:
    return str((text.get("tokenizer_kwargs") or {}).get("bpe_path") or "")
