"""The text tower of an open_clip model: texts -> unit-norm embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saebench.backbones.tokenizers import make_tokenizer
from saebench.errors import SpecError, UsageError
from saebench.specs import BackboneSpec


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
            tokenizer = make_tokenizer(self._spec)
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

    def _check_tokens(self, tokens: Tensor) -> None:
        embedded = getattr(self._model, "vocab_size", None)
        if embedded is not None and int(tokens.max()) >= embedded:
            raise SpecError(
                f"{self._spec.path or self._spec.name}: the tokenizer of '{self._spec.model}' "
                f"gives the token {int(tokens.max())}, and the text tower embeds {embedded}",
                "text_cfg.hf_tokenizer_name is not the tokenizer that it was trained with",
            )

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm float32 [n d], in the order of the texts. Errors: UsageError without texts."""
        if not texts:
            raise UsageError("there are no texts to encode", "give at least one")
        device = next(self._model.parameters()).device
        parts = []
        for start in range(0, len(texts), 256):
            tokens = self.tokenizer(list(texts[start : start + 256]))
            self._check_tokens(tokens)
            tokens = tokens.to(device)
            parts.append(self._model.encode_text(tokens).float())
        return nn.functional.normalize(torch.cat(parts), dim=-1)
