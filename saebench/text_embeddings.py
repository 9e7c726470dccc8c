"""Texts through the text tower of a backbone: any number of them, some thousands at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from saebench import hub
from saebench.errors import NonFiniteError
from saebench.finite import all_finite
from saebench.units import backbone_identity

if TYPE_CHECKING:
    from saebench.backbones import Backbone

CHUNK = 2048  # texts in memory at a time; 80 templates of 10,000 species are 800,000
MANY = 20_000  # texts from which on a terminal shows how far it is


def text_identity(backbone: Backbone) -> dict[str, Any]:
    """All of a backbone that can change the embedding of a text: fields of an artifact."""
    whole = backbone_identity(backbone.spec, backbone.spec.site)
    fields = {name: value for name, value in whole.items() if name != "site"}  # texts do not pass
    return {"backbone": fields, "dtype": str(backbone.dtype).removeprefix("torch.")}


def embedded(
    backbone: Backbone, chunks: Iterable[Sequence[str]], n_texts: int
) -> Iterator[np.ndarray]:
    """The embeddings of each chunk of texts, [n d] float32 of unit norm, in their order.

    n_texts: how many there are in all. A text longer than the tower's context is cut off there, by
    open_clip's tokenizers. Errors: UsageError (no text tower), NonFiniteError.
    """
    with _counted(n_texts) as advance:
        for texts in chunks:
            text_nd = backbone.encode_text(texts)
            if not all_finite(text_nd):
                raise NonFiniteError(
                    f"the text embeddings of '{backbone.spec.name}' are NaN or infinite near "
                    f"'{texts[0]}'",
                    "try --dtype float32",
                )
            yield text_nd.cpu().numpy()
            advance(len(texts))


@contextmanager
def _counted(n_texts: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal while very many texts are embedded."""
    if n_texts < MANY:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with hub.downloading.get()(), bar:  # the bar of the run makes room, as for a download
        task = bar.add_task("class names and captions", total=n_texts)
        yield lambda n: bar.advance(task, n)
