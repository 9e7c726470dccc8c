"""open_clip models as steps: the CLIP VisionTransformer image tower; and the text tower.

    visual.conv1, class token, position embedding, visual.ln_pre | visual.transformer.resblocks.i …
    | visual.ln_post | pool | projection -> image embedding, not normalised

The model's configuration is one that open_clip ships with, by its name, or a folder's:
`model = "local-dir:<folder>"`, relative to the entry, that holds `open_clip_config.json`. There, a
tokenizer's `text_cfg.tokenizer_kwargs.bpe_path` is relative to the folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from saebench.backbones.steps import Output, Step, SteppedModel
from saebench.errors import SpecError, UsageError
from saebench.specs import BackboneSpec

_LOCAL = "local-dir:"
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
    try:
        with _quiet():
            return open_clip.create_model(
                name, load_weights=False, pretrained_text=False, **spec.model_args
            )
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, OSError) as error:
        raise SpecError(f"{where}: open_clip cannot build '{spec.model}': {error}") from error


def model_name(spec: BackboneSpec) -> str:
    """The name that open_clip knows the model by: a folder becomes an absolute path.

    Errors: SpecError where there is no such model or folder.
    """
    where = spec.path or spec.name
    if spec.model.startswith(_LOCAL):
        folder = (Path(spec.path).parent / spec.model.removeprefix(_LOCAL)).resolve()
        if not (folder / "open_clip_config.json").is_file():
            raise SpecError(
                f"{where}: {folder} has no open_clip_config.json",
                'model = "local-dir:<folder>" is relative to the entry\'s own folder',
            )
        return f"{_LOCAL}{folder}"
    if spec.model not in open_clip.list_models():
        near = get_close_matches(spec.model, open_clip.list_models(), n=3, cutoff=0.4)
        raise SpecError(
            f"{where}: open_clip has no model '{spec.model}'",
            f"the nearest: {', '.join(near)}; or a folder of your own: local-dir:<folder>",
        )
    return spec.model


def stepped(model: nn.Module, spec: BackboneSpec) -> SteppedModel | None:
    """An open_clip model as steps, or None where its image tower is not one of those known here."""
    visual = getattr(model, "visual", None)
    if type(visual) is not VisionTransformer or not visual.transformer.batch_first:
        return None
    grid, size = visual.grid_size, tuple(visual.image_size)
    return SteppedModel(
        module=model,
        steps=_steps(visual),
        read=Output,
        tower=visual,
        prefix={"cls": 1},
        grid=(grid[0], grid[1]),
        image_size=(size[0], size[1]),
        text=ClipText(model, spec) if hasattr(model, "encode_text") else None,
    )


def _steps(visual: VisionTransformer) -> tuple[Step, ...]:
    blocks = []
    last = len(visual.transformer.resblocks) - 1
    for i, block in enumerate(visual.transformer.resblocks):
        path = f"visual.transformer.resblocks.{i}"
        starts = (path, "visual.transformer") if i == 0 else (path,)
        ends = (path, "visual.transformer") if i == last else (path,)
        blocks.append(Step(block, modules=(path,), starts=starts, ends=ends))

    embed = Step(
        visual._embeds,
        modules=("visual.conv1", "visual.patch_dropout", "visual.ln_pre"),
        starts=("visual", "visual.conv1"),
        ends=("visual.ln_pre",),
    )
    project = Step(lambda x: x if visual.proj is None else x @ visual.proj, ends=("visual",))
    return (embed, *blocks, *_pool(visual), project)


def _pool(visual: VisionTransformer) -> tuple[Step, ...]:
    """`_pool`, with the final norm as a step of its own where it comes first, as in CLIP."""
    if visual.attn_pool is not None or visual.final_ln_after_pool:
        pooling = ("visual.ln_post", "visual.attn_pool", "visual.attn_pool_contrastive")
        return (Step(lambda x: visual._pool(x)[0], modules=pooling),)
    ln_post = ("visual.ln_post",)
    return (
        Step(visual.ln_post, modules=ln_post, starts=ln_post, ends=ln_post),
        Step(lambda x: visual._global_pool(x)[0]),
    )


class ClipText:
    """The text tower: texts -> unit-norm embeddings in the space of the image embedding.

    logits of images against texts: logit_scale · image · text + logit_bias, both of unit norm.
    """

    def __init__(self, model: nn.Module, spec: BackboneSpec) -> None:
        self._model: Any = model
        self._spec = spec
        self._tokenizer: Any = None
        # Read now, in float32: the model may be converted to half precision later.
        self.logit_scale = float(self._model.logit_scale.detach().exp())
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = 0.0 if bias is None else float(bias.detach())

    @property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer of the model: texts -> int64 [n context]. Made when first used."""
        if self._tokenizer is None:
            name = model_name(self._spec)
            tokenizer = open_clip.get_tokenizer(name, **_tokenizer_args(name))
            self._check_vocabulary(tokenizer)
            self._tokenizer = tokenizer
        return self._tokenizer

    def _check_vocabulary(self, tokenizer: Any) -> None:
        # Where none is named open_clip takes CLIP's, whose indices a small tower does not embed.
        known = getattr(tokenizer, "vocab_size", None)
        embedded = getattr(self._model, "vocab_size", None)
        if known is not None and embedded is not None and known > embedded:
            raise SpecError(
                f"{self._spec.path or self._spec.name}: the tokenizer of '{self._spec.model}' has "
                f"{known} entries, and the text tower embeds {embedded}",
                "set text_cfg.tokenizer_kwargs.bpe_path to the vocabulary it was trained with",
            )

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm float32 [n d], in the order of the texts. Errors: UsageError without texts."""
        if not texts:
            raise UsageError("there are no texts to encode", "give at least one")
        device = next(self._model.parameters()).device
        parts = []
        for start in range(0, len(texts), 256):
            tokens = self.tokenizer(list(texts[start : start + 256])).to(device)
            parts.append(self._model.encode_text(tokens).float())
        return nn.functional.normalize(torch.cat(parts), dim=-1)


def _tokenizer_args(name: str) -> dict[str, Any]:
    """A folder's vocabulary, found beside its configuration; open_clip would look in the cwd."""
    if not name.startswith(_LOCAL):
        return {}
    folder = Path(name.removeprefix(_LOCAL))
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    text = config.get("model_cfg", {}).get("text_cfg", {})
    bpe = text.get("tokenizer_kwargs", {}).get("bpe_path")
    return {} if bpe is None else {"bpe_path": str(folder / bpe)}


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
